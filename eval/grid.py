"""Pictures side by side with readable labels, as one picture."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, PALE = "white", "#1a1a1a", "#666666"
GAP, MARGIN = 6, 16


@dataclass(frozen=True)
class Row:
    """One line of a grid.

    Args:
        label: its name, in large letters to the left.
        pictures: one per column; ``None`` leaves a hole.
        notes: short lines below the label.
    """

    label: str
    pictures: Sequence[Image.Image | None]
    notes: Sequence[str] = ()


def grid(
    rows: Sequence[Row], columns: Sequence[str], *, title: str = "", tile: int = 192
) -> Image.Image:
    """Draw rows of pictures under column names.

    Args:
        rows: from top to bottom.
        columns: one name per picture of a row.
        title: a line over everything; it is broken where it gets too long.
        tile: the longer side of a picture in the grid, in pixels. Small pictures are enlarged.

    Raises:
        ValueError: if a row has another number of pictures than there are columns.
    """
    for row in rows:
        if len(row.pictures) != len(columns):
            raise ValueError(f"{len(row.pictures)} pictures in row {row.label!r} for {columns}")
    large, small = ImageFont.load_default(20), ImageFont.load_default(14)
    texts = [(row.label, large) for row in rows] + [(n, small) for row in rows for n in row.notes]
    left = round(max((font.getlength(text) for text, font in texts), default=0)) + 2 * MARGIN
    width = left + len(columns) * (tile + GAP) + MARGIN
    lines = _broken(title, small, width - 2 * MARGIN)
    heads = [_narrow(name, small, tile) for name in columns]
    top = MARGIN + len(lines) * 20 + 10 + 18 * max(map(len, heads), default=1)
    sheet = Image.new("RGB", (width, top + len(rows) * (tile + GAP) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + 20 * number), line, INK, small)
    for index, head in enumerate(heads):
        centre = left + index * (tile + GAP) + tile / 2
        for place, line in enumerate(reversed(head)):
            draw.text((centre, top - 8 - 18 * place), line, PALE, small, anchor="ms")
    for number, row in enumerate(rows):
        upper = top + number * (tile + GAP)
        height = 26 + 18 * len(row.notes)
        text = upper + (tile - height) // 2
        draw.text((MARGIN, text), row.label, INK, large)
        for line_number, note in enumerate(row.notes):
            draw.text((MARGIN, text + 28 + 18 * line_number), note, PALE, small)
        for index, picture in enumerate(row.pictures):
            if picture is not None:
                fitted = _fitted(picture, tile)
                offset = ((tile - fitted.width) // 2, (tile - fitted.height) // 2)
                sheet.paste(fitted, (left + index * (tile + GAP) + offset[0], upper + offset[1]))
    return sheet


def _fitted(picture: Image.Image, tile: int) -> Image.Image:
    """The picture with its longer side at `tile`."""
    factor = tile / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _narrow(name: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A column's name in lines no wider than `width`, broken where its parts begin if it can be."""
    lines: list[str] = []
    parts: list[str] = []
    for part in re.split(r"(?<=[ ,])|(?=[\[@])", name):
        parts += re.split(r"(?<==)", part) if font.getlength(part) > width else [part]
    for part in parts:
        if lines and font.getlength(lines[-1] + part) <= width:
            lines[-1] += part
            continue
        lines.append("")
        for letter in part:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines or [""]


def _broken(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines no wider than `width`, broken at spaces."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
