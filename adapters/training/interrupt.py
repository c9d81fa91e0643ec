"""Ctrl-C that waits for the end of a step, so that what is saved is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Interrupt:
    """Whether somebody asked to stop."""

    asked = False


@contextmanager
def deferred() -> Iterator[Interrupt]:
    """Within the block the first Ctrl-C or termination only sets ``asked``; a second one acts."""
    found = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before: dict[int, Any] = {}

    def ask(*_: object) -> None:
        found.asked = True
        _put(before)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.getsignal(number)
        if before[number] is not None:
            signal.signal(number, ask)
    try:
        yield found
    finally:
        _put(before)


def _put(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None:  # those that were not set by Python cannot be set by it
            signal.signal(number, handler)
