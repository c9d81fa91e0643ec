"""Which pictures of a run a report is about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cmlora.errors import CmloraError
from cmlora.eval.study import Record


@dataclass(frozen=True)
class Selection:
    """Everything, but for what is said here.

    Args:
        labels: methods, and for how many tests are corrected.
        sizes: how many LoRAs per set.
        seeds: of the pictures.
        common: only sets and seeds that have a picture of every method; where methods were not
            run on the same sets, only then do their numbers compare.
    """

    labels: Sequence[str] = ()
    sizes: Sequence[int] = ()
    seeds: Sequence[int] = ()
    common: bool = False

    def of(self, records: Sequence[Record]) -> tuple[Record, ...]:
        """The records that are meant, in their order.

        Raises:
            CmloraError: if there is none of a method, size or seed, or nothing is left.
        """
        for words, wanted, known in (
            ("pictures of", self.labels, {record.label for record in records}),
            ("sets of so many LoRAs:", self.sizes, {record.n for record in records}),
            ("pictures with seed", self.seeds, {record.seed for record in records}),
        ):
            for one in wanted:
                if one not in known:
                    there = ", ".join(map(str, sorted(known)))
                    raise CmloraError(f"no {words} {one!r}; there are {there}")
        left = [
            record
            for record in records
            if (not self.labels or record.label in self.labels)
            and (not self.sizes or record.n in self.sizes)
            and (not self.seeds or record.seed in self.seeds)
        ]
        if self.common:
            methods = len({record.label for record in left})
            shared = Counter((record.ids, record.seed) for record in left)
            left = [record for record in left if shared[record.ids, record.seed] == methods]
        if not left:
            raise CmloraError("these methods, sizes and seeds have no set and seed in common")
        return tuple(left)
