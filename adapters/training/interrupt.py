"""Ctrl-C that waits for the end of a step, so that what is saved is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
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
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.getsignal(number)
        if before[number] is not None:
            signal.signal(number, ask)
    try:
        yield found
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
