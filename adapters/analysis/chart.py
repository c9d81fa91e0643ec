"""A few lines over a common axis as a picture, PNG or SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cmlora.atomic import replacing
from cmlora.errors import CmloraError

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
        """The chart as an SVG document."""
        width, height = self._size()
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]
        for color, points in self._strokes():
            listed = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(
                f'<polyline points="{listed}" fill="none" stroke="rgb{color}" stroke-width="2"/>'
            )
        for x, y, text, color in self._texts():
            parts.append(f'<text x="{x}" y="{y + 12}" fill="rgb{color}">{escape(text)}</text>')
        return "\n".join([*parts, "</svg>\n"])

    def image(self) -> Image.Image:
        """The chart as a picture."""
        image = Image.new("RGB", self._size(), "white")
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
        for color, points in self._strokes():
            draw.line(points, fill=color, width=2)
        for x, y, text, color in self._texts():
            draw.text((x, y), text, fill=color, font=font)
        return image

    def _size(self) -> tuple[int, int]:
        return _WIDTH, _HEIGHT + 18 * len(self.lines)

    def _range(self) -> tuple[float, float]:
        values = [v for line in self.lines.values() for v in line if math.isfinite(v)] or [0.0]
        low, high = min(values), max(values)
        return (low, high) if high > low else (low - 0.5, high + 0.5)

    def _strokes(self) -> Iterator[tuple[tuple[int, int, int], list[tuple[float, float]]]]:
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

    def _texts(self) -> list[tuple[int, int, str, tuple[int, int, int]]]:
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
