"""Work that tells how it goes and can be stopped at once."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cmlora.errors import CmloraError

T = TypeVar("T")

_POLL = 0.2


class Stopped(CmloraError):
    """The person who asked for the work does not want it any more."""


class Ticket:
    """Stands for one request; whoever holds it can stop the work."""

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ask the work to end; it ends inside the model call that is running."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """Whether somebody asked for the end."""
        return self._stopped.is_set()

    def check(self) -> None:
        """Raises `Stopped` if the work is to end."""
        if self._stopped.is_set():
            raise Stopped("stopped")

    @contextmanager
    def guarding(self, *models: Any) -> Iterator[None]:
        """Look at the ticket before every block of the models, so that no pass is waited for.

        Args:
            models: torch modules; what goes on them comes off again.
        """

        def look(*_: Any) -> None:
            self.check()

        handles = []
        try:
            for model in models:
                for module in _blocks(model):
                    handles.append(module.register_forward_pre_hook(look))
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class Progress:
    """How far a piece of work is.

    Args:
        done: units finished.
        total: units there are.
        words: what is going on.
        seconds_left: an estimate; ``None`` as long as there is nothing to estimate from.
        preview: a picture of the present state as a ``data:`` address; empty if there is none.
    """

    done: int
    total: int
    words: str
    seconds_left: float | None = None
    preview: str = ""

    @property
    def share(self) -> float:
        """Of the work that is done, 0 to 1."""
        return self.done / self.total if self.total else 0.0


@dataclass(frozen=True)
class Result(Generic[T]):
    """Something finished, on the way or at the end."""

    value: T


Event = Progress | Result[Any]
Report = Callable[[Event], None]


class Clock:
    """Estimates the remaining time from the pace so far.

    The first unit is left out as soon as there are others: it pays for what is set up once.

    Args:
        total: units there are.
        now: the time in seconds.
    """

    def __init__(self, total: int, now: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.done = 0
        self._now = now
        self._started = self._first = now()

    def tick(self) -> None:
        """One more unit is finished."""
        self.done += 1
        if self.done == 1:
            self._first = self._now()

    def left(self) -> float | None:
        """Seconds until the end."""
        if not self.done:
            return None
        if self.done == 1:
            pace = self._first - self._started
        else:
            pace = (self._now() - self._first) / (self.done - 1)
        return pace * (self.total - self.done)


def stream(work: Callable[[Report], None], ticket: Ticket) -> Iterator[Event]:
    """Do the work in a thread and hand its events on as they come.

    If nobody listens any more, the work is stopped. When the iterator ends the thread has ended.

    Args:
        work: is given the function that it reports events with.
        ticket: stops it.

    Raises:
        CmloraError: what the work raised; so does every other exception.
    """
    events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            ticket.check()
            work(events.put)
        except BaseException as error:
            failure.append(error)
        finally:
            events.put(None)

    thread = threading.Thread(target=run, name="cmlora-work", daemon=True)
    thread.start()
    try:
        while True:
            try:
                event = events.get(timeout=_POLL)
            except queue.Empty:
                continue
            if event is None:
                break
            yield event
    finally:
        if thread.is_alive():
            ticket.stop()
        thread.join()
    if failure:
        raise failure[0]


class Tickets:
    """The running ticket of every visitor, so that a visitor stops only their own work."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._held: dict[str, list[Ticket]] = {}
        self._asked: dict[str, int] = {}
        self._withdrawn: dict[str, int] = {}

    @property
    def held(self) -> bool:
        """Whether anybody's work is running or waits for the model."""
        return bool(self._held)

    def ask(self, visitor: str) -> int:
        """The number of a request that will wait in the queue before it takes its ticket."""
        with self._lock:
            self._asked[visitor] = self._asked.get(visitor, 0) + 1
            return self._asked[visitor]

    @contextmanager
    def take(self, visitor: str, number: int | None = None) -> Iterator[Ticket]:
        """A new ticket, as long as the block runs.

        Args:
            visitor: whose it is.
            number: what `ask` gave; the ticket is stopped already if the visitor has said stop
                since then.
        """
        ticket = Ticket()
        with self._lock:
            self._held.setdefault(visitor, []).append(ticket)
            if number is not None and number <= self._withdrawn.get(visitor, 0):
                ticket.stop()
        try:
            yield ticket
        finally:
            with self._lock:
                left = [other for other in self._held[visitor] if other is not ticket]
                if left:
                    self._held[visitor] = left
                else:
                    del self._held[visitor]
                    self._lock.notify_all()

    def idle(self, patience: float) -> bool:
        """Wait for everybody's work to end; says whether it has.

        Args:
            patience: seconds after which it is waited for no longer.
        """
        with self._lock:
            return self._lock.wait_for(lambda: not self._held, patience)

    def stop(self, visitor: str) -> int:
        """Stop everything of a visitor, what still waits included; says how much was running."""
        with self._lock:
            self._withdrawn[visitor] = self._asked.get(visitor, 0)
            held = list(self._held.get(visitor, ()))
        for ticket in held:
            ticket.stop()
        return len(held)

    def stop_all(self) -> None:
        """Stop everything of everybody."""
        with self._lock:
            visitors = list(self._held)
        for visitor in visitors:
            self.stop(visitor)


class Newest:
    """Requests that replace each other: one at a time, and of a visitor's only the newest."""

    def __init__(self) -> None:
        self._working = threading.Lock()
        self._counting = threading.Lock()
        self._newest: dict[str, int] = {}

    @property
    def asked(self) -> int:
        """How many requests there have been."""
        with self._counting:
            return sum(self._newest.values())

    @contextmanager
    def turn(self, visitor: str) -> Iterator[bool]:
        """Wait for those before it; True if the visitor has not asked again since.

        Args:
            visitor: whose request it is.
        """
        with self._counting:
            number = self._newest[visitor] = self._newest.get(visitor, 0) + 1
        with self._working:
            yield self._newest.get(visitor) == number


def _blocks(model: Any) -> list[Any]:
    """The model, its parts and the parts of its lists: close enough together, and few."""
    found = [model]
    for child in model.children():
        found.append(child)
        found += child.children()
    return found
