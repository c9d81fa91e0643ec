"""What is written down while LoRAs are merged, module by module, until it is a report."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from cmlora.adapters.merging.result import LOST, Report
from cmlora.adapters.merging.tally import Tally
from cmlora.lora import Update


class Account:
    """One merge, from the moment this is made.

    Attributes:
        gaps: distances from the exact weighted sum.
        cuts: what cuts to a rank leave out.
        remarks: what the user should know, each once, as the keys.
    """

    def __init__(self) -> None:
        self.gaps, self.cuts = Tally(), Tally()
        self.remarks: dict[str, None] = {}
        self._notes: dict[str, list[float]] = {}
        self._started = time.perf_counter()

    def note(self, notes: Mapping[str, float]) -> None:
        """What a method says of itself at one module."""
        for key, number in notes.items():
            self._notes.setdefault(key, []).append(number)

    def report(self, method: str, kind: str, updates: Mapping[str, Update]) -> Report:
        """The report about the merged updates, by module.

        Args:
            method: its name.
            kind: what its weights mean, see `Method`.
            updates: the result.
        """
        notes = {key: math.fsum(rows) / len(rows) for key, rows in self._notes.items()}
        return Report(
            method=method,
            kind=kind,
            errors=self.gaps.by_block,
            error=self.gaps.all,
            rank=max((update.rank for update in updates.values()), default=0),
            bytes=sum(update.up.nbytes + update.down.nbytes for update in updates.values()),
            seconds=time.perf_counter() - self._started,
            notes=notes | ({LOST: self.cuts.all} if self.cuts else {}),
            warnings=tuple(self.remarks),
        )
