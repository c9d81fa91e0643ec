"""Boxes, lines and words as a picture, PNG or SVG, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cmlora.atomic import replacing
from cmlora.errors import CmloraError

Color = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

_LETTERS, _BASELINE = 12, 12


@dataclass(frozen=True)
class Drawing:
    """What is drawn on white, in this order; places are pixels from the upper left corner.

    Args:
        size: width and height.
        boxes: x, y, width, height and color.
        lines: color and points.
        words: x, y of their upper left corner, text and color.
    """

    size: tuple[int, int]
    boxes: Sequence[tuple[int, int, int, int, Color]] = ()
    lines: Sequence[tuple[Color, Sequence[tuple[float, float]]]] = ()
    words: Sequence[tuple[int, int, str, Color]] = ()

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

    def above(self, other: Drawing) -> Drawing:
        """Both in one picture, this one on top."""
        down = self.size[1]
        return Drawing(
            (max(self.size[0], other.size[0]), down + other.size[1]),
            [*self.boxes, *((x, y + down, w, h, color) for x, y, w, h, color in other.boxes)],
            [*self.lines, *((c, [(x, y + down) for x, y in points]) for c, points in other.lines)],
            [*self.words, *((x, y + down, text, color) for x, y, text, color in other.words)],
        )

    def svg(self) -> str:
        """The drawing as an SVG document."""
        width, height = self.size
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'font-family="sans-serif" font-size="{_LETTERS}">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]
        for x, y, wide, high, color in self.boxes:
            parts.append(
                f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" fill="rgb{color}"/>'
            )
        for color, points in self.lines:
            listed = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(
                f'<polyline points="{listed}" fill="none" stroke="rgb{color}" stroke-width="2"/>'
            )
        for x, y, text, color in self.words:
            place = f'x="{x}" y="{y + _BASELINE}"'
            parts.append(f'<text {place} fill="rgb{color}">{escape(text)}</text>')
        return "\n".join([*parts, "</svg>\n"])

    def image(self) -> Image.Image:
        """The drawing as a picture."""
        image = Image.new("RGB", self.size, "white")
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(_LETTERS)
        for x, y, wide, high, color in self.boxes:
            draw.rectangle((x, y, x + wide - 1, y + high - 1), fill=color)
        for color, points in self.lines:
            draw.line(list(points), fill=color, width=2)
        for x, y, text, color in self.words:
            draw.text((x, y), text, fill=color, font=font)
        return image
