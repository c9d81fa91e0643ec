"""A few lines over a common axis as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cmlora.adapters.analysis.drawing import Color, Drawing

_WIDTH, _HEIGHT = 480, 260
_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 34, 16, 28
_COLORS = ((33, 102, 172), (178, 24, 43), (27, 120, 55), (118, 42, 131), (191, 129, 45))


@dataclass(frozen=True)
class Chart:
    """Named lines.

    Args:
        title: above.
        places: along the axis, ascending, two or more.
        lines: by name, a value for each place; those that are not finite are left out.
    """

    title: str
    places: Sequence[float]
    lines: Mapping[str, Sequence[float]]

    def drawing(self) -> Drawing:
        """The chart as lines and words."""
        size = _WIDTH, _HEIGHT + 18 * len(self.lines)
        return Drawing(size, lines=list(self._strokes()), words=self._texts())

    def save(self, path: str | Path) -> None:
        """Draw it; see `cmlora.adapters.analysis.drawing.Drawing.save`."""
        self.drawing().save(path)

    def _range(self) -> tuple[float, float]:
        values = [v for line in self.lines.values() for v in line if math.isfinite(v)] or [0.0]
        low, high = min(values), max(values)
        return (low, high) if high > low else (low - 0.5, high + 0.5)

    def _strokes(self) -> Iterator[tuple[Color, list[tuple[float, float]]]]:
        x_end, y_end = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        yield (150, 150, 150), [(_LEFT, _TOP), (_LEFT, y_end), (x_end, y_end)]
        low, high = self._range()
        first, last = self.places[0], self.places[-1]
        for index, line in enumerate(self.lines.values()):
            points = [
                (
                    _LEFT + (x_end - _LEFT) * (place - first) / ((last - first) or 1.0),
                    y_end - (y_end - _TOP) * (value - low) / (high - low),
                )
                for place, value in zip(self.places, line, strict=True)
                if math.isfinite(value)
            ]
            if len(points) > 1:
                yield _COLORS[index % len(_COLORS)], points

    def _texts(self) -> list[tuple[int, int, str, Color]]:
        black = (0, 0, 0)
        low, high = self._range()
        texts = [
            (8, 6, self.title, black),
            (4, _TOP - 6, f"{high:.3g}", black),
            (4, _HEIGHT - _BOTTOM - 8, f"{low:.3g}", black),
            (_LEFT, _HEIGHT - _BOTTOM + 6, f"{self.places[0]:g}", black),
            (_WIDTH - _RIGHT - 28, _HEIGHT - _BOTTOM + 6, f"{self.places[-1]:g}", black),
        ]
        for index, name in enumerate(self.lines):
            texts.append((_LEFT, _HEIGHT + 18 * index, name, _COLORS[index % len(_COLORS)]))
        return texts
