"""The books of a run: which step it is, what is planned for it, what has been done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from cmlora.guided import OFF, Guidance
from cmlora.macs import MacCounter
from cmlora.plan import Member, Pass, Plan, Policy, Step, Strategy
from cmlora.tracker import Tick, Tracker

if TYPE_CHECKING:
    from torch import Tensor

_EMPTY = Plan((Pass({}),))


@dataclass(frozen=True)
class Report:
    """What the last run did.

    Args:
        method: the method's name.
        steps: denoising steps carried out.
        calls: passes of the denoiser, full and light; one on one branch of guidance is a half.
        full: full passes by `Pass.key`.
        light: passes that reused a cached feature, by `Pass.key`.
        seconds: wall time from the first denoiser call to the end of the last one.
        macs: multiply-accumulates of all passes, if somebody counted them.
    """

    method: str
    steps: int = 0
    calls: float = 0
    full: Mapping[str, float] = field(default_factory=dict)
    light: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    macs: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)


class Run:
    """Asks the strategy what to run at every step, and keeps count.

    A pipeline has one, whatever number of denoisers it calls: the plan of a step is the same for
    all of them, and a run begins and ends for all of them at once.

    Args:
        strategy: says what to run.
        members: the LoRAs, in the user's order.
        policy: when cached features are refreshed.
        tracker: finds the step.
        method: the strategy's name in reports.
        options: keyword arguments of the strategy.
        prepare: called at the first denoiser call of every run.
        counter: counts multiply-accumulates, or ``None``.
    """

    def __init__(
        self,
        strategy: Strategy,
        members: Sequence[Member],
        policy: Policy,
        *,
        tracker: Tracker,
        method: str = "",
        options: Mapping[str, Any] | None = None,
        prepare: Callable[[], None] = lambda: None,
        counter: MacCounter | None = None,
    ) -> None:
        self._observed: tuple[Mapping[str, float], ...] = ()
        self._measuring: Callable[[], Mapping[str, float]] | None = None
        self._changes: tuple[float, ...] = ()
        self._previous: Tensor | None = None
        self._counter = counter
        self.policy = policy
        self._strategy = strategy
        self._members = tuple(members)
        self._tracker = tracker
        self._method = method
        self._options = dict(options or {})
        self._prepare = prepare
        self._begins: list[Callable[[], None]] = []
        self._ends: list[Callable[[], None]] = []
        self._full: Counter[str] = Counter()
        self._light: Counter[str] = Counter()
        self._expected = 0
        self._open(0.0)

    @property
    def report(self) -> Report:
        """Of the last run, finished or not."""
        return Report(
            method=self._method,
            steps=self._steps,
            calls=self._full.total() + self._light.total(),
            full=dict(self._full),
            light=dict(self._light),
            seconds=self._stopped - self._started,
            macs=None if self._counter is None else self._counter.total,
        )

    @property
    def pipe(self) -> Any:
        """The pipeline, or what stands for it."""
        return self._tracker.pipe

    @property
    def timestep(self) -> float:
        """The scheduler's value at the last call."""
        return self._timestep

    @property
    def expected(self) -> int:
        """How many denoising steps the run is going to have."""
        return self._expected

    def join(self, *, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """Take part: be called when a run begins, and when one is over or given up."""
        self._begins.append(begin)
        self._ends.append(end)

    def tick(self, timestep: Any, context: Any, now: float) -> Tick:
        """Note a call of a denoiser; the first one of a run tells all who take part."""
        tick = self._tracker.tick(timestep, context)
        self._expected = tick.count
        if tick.fresh:
            self._open(now)
            for begin in self._begins:
                begin()
            self._prepare()
        self._timestep = tick.timestep
        return tick

    def plan(
        self,
        tick: Tick,
        sample: Tensor | None,
        guidance: Guidance = OFF,
        absent: Collection[str] = (),
    ) -> Plan:
        """What to run at a call; the strategy is asked once per step.

        Args:
            tick: where the run is.
            sample: what goes into the denoiser, (B, C, H, W).
            guidance: what is known of it.
            absent: LoRAs that have no part in this denoiser.
        """
        if not tick.repeated:
            self._steps += 1
            if self._measuring is not None:
                self.observed(self._measuring())
                self._measuring = None
            if getattr(self.policy, "adaptive", False):
                self._compare(sample)
            step = Step(
                tick.index,
                tick.count,
                tick.timestep,
                sample,
                self._observed,
                sigma=tick.sigma,
                guidance=None if guidance == OFF else guidance.scale,
                changes=self._changes,
                apart=guidance.apart,
            )
            members = tuple(m for m in self._members if m.name not in absent)
            self._plan = (
                self._strategy(step, members, self.policy, **self._options)
                if members or not self._members
                else _EMPTY
            )
        return self._plan

    def observed(self, values: Mapping[str, float]) -> None:
        """Keep what a plan measured for later steps."""
        self._observed = (*self._observed, values)

    def measure(self, later: Callable[[], Mapping[str, float]] | None) -> None:
        """Have something measured before the next step, unless this is taken back by then."""
        self._measuring = later

    def count(self, single: Pass, *, light: bool, side: str = "both") -> None:
        """Note a pass; one on one half of a batch counts one half."""
        share: Any = 1 if side == "both" else 0.5
        (self._light if light else self._full)[single.key] += share

    def counting(self, kind: Hashable) -> AbstractContextManager[None]:
        """A context for one pass; passes of the same kind cost the same."""
        return nullcontext() if self._counter is None else self._counter.around(kind)

    def stop(self, now: float) -> None:
        """Note the end of a call."""
        self._stopped = now

    def end(self) -> None:
        """The next call begins a new run."""
        self._tracker.reset()
        self._measuring = None
        for end in self._ends:
            end()

    def _open(self, now: float) -> None:
        """Start the books; nothing of an earlier run may reach into this one."""
        self._steps = 0
        if self._counter is not None:
            self._counter.begin()
        self._full.clear()
        self._light.clear()
        self._started = self._stopped = now
        self._timestep = 0.0
        self._observed = ()
        self._measuring = None
        self._changes = ()
        self._previous = None
        self._plan = _EMPTY

    def _compare(self, sample: Tensor | None) -> None:
        """Append the relative L1 change of the input since the step before."""
        change, previous = 0.0, self._previous
        if sample is not None:
            if previous is not None and previous.shape == sample.shape:
                size = previous.abs().mean().clamp_min(1e-12)
                change = float((sample.float() - previous).abs().mean() / size)
            self._previous = sample.float().clone()
        self._changes = (*self._changes, change)
