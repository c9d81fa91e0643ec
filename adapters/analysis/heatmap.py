"""A table of numbers from -1 to 1 as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmlora.adapters.analysis.drawing import Color, Drawing

_CELL, _LINE, _LETTER = 56, 24, 7
_BLUE, _WHITE, _RED, _BLACK = (33, 102, 172), (247, 247, 247), (178, 24, 43), (0, 0, 0)


@dataclass(frozen=True)
class Heatmap:
    """Numbers with names.

    Args:
        title: above the table.
        rows: names of the rows.
        columns: names of the columns.
        values: row by row, -1 to 1; NaN leaves a cell empty.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]

    def drawing(self) -> Drawing:
        """The table as boxes and words."""
        named = max((i * _CELL + _LETTER * len(n) for i, n in enumerate(self.columns)), default=0)
        width = max(len(self.columns) * _CELL, named, _LETTER * len(self.title) - self._left)
        size = self._left + width + 12, self._top + _LINE * len(self.rows) + 8
        words = [(x, y + 5, text, _BLACK) for x, y, text in self._texts()]
        return Drawing(size, boxes=self._cells(), words=words)

    def save(self, path: str | Path) -> None:
        """Draw it; see `cmlora.adapters.analysis.drawing.Drawing.save`."""
        self.drawing().save(path)

    @property
    def _left(self) -> int:
        return 12 + _LETTER * max(map(len, self.rows), default=0)

    @property
    def _top(self) -> int:
        # A column's name stands on lines of its own, so that long names need no rotation.
        return _LINE * (1 + len(self.columns))

    def _cells(self) -> list[tuple[int, int, int, int, Color]]:
        return [
            (self._left + j * _CELL, self._top + i * _LINE, _CELL, _LINE, _color(value))
            for i, row in enumerate(self.values)
            for j, value in enumerate(row)
            if math.isfinite(value)
        ]

    def _texts(self) -> list[tuple[int, int, str]]:
        texts = [(6, 0, self.title)]
        for j, name in enumerate(self.columns):
            texts.append((self._left + j * _CELL + 2, _LINE * (1 + j), name))
        for i, (name, row) in enumerate(zip(self.rows, self.values, strict=True)):
            y = self._top + i * _LINE
            texts.append((6, y, name))
            for j, value in enumerate(row):
                if math.isfinite(value):
                    texts.append((self._left + j * _CELL + 12, y, f"{value:+.2f}"))
        return texts


def _color(value: float) -> Color:
    """White at 0, red at 1, blue at -1; never so dark that black text is lost."""
    end = _RED if value > 0 else _BLUE
    share = 0.75 * min(abs(value), 1.0)
    r, g, b = (round((1 - share) * w + share * e) for w, e in zip(_WHITE, end, strict=True))
    return r, g, b


def of_pairs(title: str, pairs: Sequence[Mapping[str, Any]]) -> Heatmap:
    """Cosine by block (rows) and pair (columns), from `Report.pairs`."""
    tables = [{block: row["cosine"] for block, row in pair["blocks"].items()} for pair in pairs]
    blocks = sorted({block for table in tables for block in table})
    columns = tuple(" / ".join(pair["loras"]) for pair in pairs)
    values = tuple(tuple(table.get(block, math.nan) for table in tables) for block in blocks)
    return Heatmap(title, tuple(blocks), columns, values)
