"""A table of numbers from -1 to 1 as a picture, PNG or SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from cmlora.atomic import replacing
from cmlora.errors import CmloraError

_CELL, _LINE, _LETTER = 56, 24, 7
_BLUE, _WHITE, _RED = (33, 102, 172), (247, 247, 247), (178, 24, 43)


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

    def save(self, path: str | Path) -> None:
        """Draw it; the name's end decides between PNG and SVG.

        Raises:
            CmloraError: for any other ending, or if the place cannot be written to.
        """
        path = Path(path)
        if path.suffix not in (".png", ".svg"):
            raise CmloraError(f"{path} should end in .png or .svg")
        with replacing(path) as file:
            if path.suffix == ".svg":
                file.write(self.svg().encode())
            else:
                self.image().save(file, "PNG")

    def svg(self) -> str:
        """The table as an SVG document."""
        width, height = self._size()
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]
        for x, y, color in self._cells():
            parts.append(
                f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_LINE}" fill="rgb{color}"/>'
            )
        for x, y, text in self._texts():
            parts.append(f'<text x="{x}" y="{y + 16}">{escape(text)}</text>')
        return "\n".join([*parts, "</svg>\n"])

    def image(self) -> Image.Image:
        """The table as a picture."""
        image = Image.new("RGB", self._size(), "white")
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
        for x, y, color in self._cells():
            draw.rectangle((x, y, x + _CELL - 1, y + _LINE - 1), fill=color)
        for x, y, text in self._texts():
            draw.text((x, y + 5), text, fill="black", font=font)
        return image

    @property
    def _left(self) -> int:
        return 12 + _LETTER * max(map(len, self.rows), default=0)

    @property
    def _top(self) -> int:
        # A column's name stands on lines of its own, so that long names need no rotation.
        return _LINE * (1 + len(self.columns))

    def _size(self) -> tuple[int, int]:
        named = max((i * _CELL + _LETTER * len(n) for i, n in enumerate(self.columns)), default=0)
        width = max(len(self.columns) * _CELL, named, _LETTER * len(self.title) - self._left)
        return self._left + width + 12, self._top + _LINE * len(self.rows) + 8

    def _cells(self) -> list[tuple[int, int, tuple[int, int, int]]]:
        return [
            (self._left + j * _CELL, self._top + i * _LINE, _color(value))
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


def _color(value: float) -> tuple[int, int, int]:
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
