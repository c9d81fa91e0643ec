"""Where a grid puts its pictures."""

import pytest
from PIL import Image

from cmlora.eval.grid import Row, grid

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
