"""Where a grid puts its pictures."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from cmlora.eval.grid import GAP, MARGIN, Row, _narrow, grid

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]


def squares(size: int = 4) -> list[Image.Image]:
    return [Image.new("RGB", (size, size), colour) for colour in COLOURS]


def test_every_picture_is_there_once_and_enlarged() -> None:
    first, second, third, fourth = squares()
    sheet = grid([Row("a", [first, second]), Row("b", [third, fourth])], ["1", "2"], tile=32)
    count = {colour: n for n, colour in sheet.getcolors(1 << 24) or []}
    assert [count[colour] for colour in COLOURS] == [32 * 32] * 4


def test_rows_and_columns_keep_their_order() -> None:
    first, second, third, fourth = squares()
    sheet = grid([Row("a", [first, second]), Row("b", [third, fourth])], ["1", "2"], tile=32)
    where: dict[object, tuple[int, int]] = {}
    for x in range(sheet.width):
        for y in range(sheet.height):
            where.setdefault(sheet.getpixel((x, y)), (x, y))
    corners = [where[colour] for colour in COLOURS]
    assert corners[0][0] == corners[2][0] < corners[1][0] == corners[3][0]
    assert corners[0][1] == corners[1][1] < corners[2][1] == corners[3][1]


def test_shapes_are_kept() -> None:
    wide = Image.new("RGB", (8, 4), COLOURS[0])
    sheet = grid([Row("a", [wide])], ["1"], tile=32)
    count = {colour: n for n, colour in sheet.getcolors(1 << 24) or []}
    assert count[COLOURS[0]] == 32 * 16


def test_a_hole_stays_white() -> None:
    sheet = grid([Row("a", [None])], ["1"], tile=32)
    assert sheet.getpixel((sheet.width - 30, sheet.height - 30)) == (255, 255, 255)


def test_a_long_title_is_broken_and_not_cut() -> None:
    one = grid([Row("a", [None])], ["1"], title="word", tile=64)
    many = grid([Row("a", [None])], ["1"], title="word " * 50, tile=64)
    assert many.width == one.width
    assert many.height > one.height + 60


def test_a_row_needs_a_picture_per_column() -> None:
    with pytest.raises(ValueError, match="1 pictures in row 'a'"):
        grid([Row("a", [None])], ["1", "2"])


def test_long_names_of_columns_stay_in_their_columns() -> None:
    name = "cmlora[dominant_full=always]@nonuniform"
    tile = 128
    empty = grid([Row("a", [None, None, None])], ["", "", ""], tile=tile)
    sheet = grid([Row("a", [None, None, None])], ["", name, ""], tile=tile)
    assert sheet.width == empty.width
    assert sheet.height > empty.height
    dark = np.array(sheet.convert("L"))[: sheet.height - tile - GAP - MARGIN] < 200
    left = sheet.width - MARGIN - 2 * (tile + GAP)
    columns = np.flatnonzero(dark.any(0))
    assert len(columns) > 0
    assert left <= columns.min()
    assert columns.max() < left + tile


def test_a_name_is_broken_where_its_parts_begin() -> None:
    font = ImageFont.load_default(14)
    name = "cmlora[order=high_first,decay=false]@nonuniform"
    for width in (20, 60, 128, 400):
        lines = _narrow(name, font, width)
        assert "".join(lines) == name
        assert all(font.getlength(line) <= width for line in lines)
    assert _narrow("seed 3", font, 128) == ["seed 3"]
    assert _narrow("cmlora[decay=false]@nonuniform", font, 128) == [
        "cmlora",
        "[decay=false]",
        "@nonuniform",
    ]
