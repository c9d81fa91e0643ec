"""Multiply-accumulates of a run, counted while it runs, for any denoiser."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from torch.utils.flop_counter import FlopCounterMode


class MacCounter:
    """Counts every kind of pass the first time it runs, attention and the LoRAs' own products too.

    Counting slows that one pass down; the same kind of pass costs the same ever after.
    """

    def __init__(self) -> None:
        self.total = 0
        self._known: dict[Hashable, int] = {}

    def begin(self) -> None:
        """A new run."""
        self.total = 0

    @contextmanager
    def around(self, kind: Hashable) -> Iterator[None]:
        """A context for one pass.

        Args:
            kind: passes of the same kind do the same work.
        """
        if kind not in self._known:
            with FlopCounterMode(display=False) as counter:
                yield
            self._known[kind] = counter.get_total_flops() // 2
        else:
            yield
        self.total += self._known[kind]
