"""How far merged matrices are from exact ones, summed up over the blocks of a model."""

from __future__ import annotations

import math
import re

from cmlora.adapters.merging.factors import Pair


class Tally:
    """Distances and what they are relative to, by block."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[float, float]]] = {}

    def add(self, module: str, gap: float, size: float) -> None:
        """One module: a distance, and the norm that it is compared with."""
        self._rows.setdefault(block(module), []).append((gap, size))

    def compare(self, module: str, found: Pair, exact: Pair, scale: float) -> None:
        """One module's matrix beside the exact sum; one that cancels counts as large as its parts.

        Args:
            module: its name.
            found: the merged matrix.
            exact: the weighted sum.
            scale: sum of the norms of what is added up.
        """
        size = exact.norm()
        self.add(module, found.distance(exact), size if size > 1e-9 * scale else scale)

    @property
    def by_block(self) -> dict[str, float]:
        """Relative distance of every block."""
        return {where: _relative(rows) for where, rows in sorted(self._rows.items())}

    @property
    def all(self) -> float:
        """Relative distance over all modules; 0 if there are none."""
        return _relative([row for rows in self._rows.values() for row in rows])

    def __bool__(self) -> bool:
        return bool(self._rows)


def block(module: str) -> str:
    """The part of the model a module belongs to: its name up to the first number.

    >>> block("unet.down_blocks.0.attentions.1.proj_in")
    'unet.down_blocks.0'
    """
    found = re.match(r"(.*?\.\d+)\.", module)
    return found[1] if found else module.rpartition(".")[0]


def _relative(rows: list[tuple[float, float]]) -> float:
    lost, size = (math.hypot(*column) for column in zip(*rows, strict=True)) if rows else (0, 1)
    return lost / size if size else 0.0
