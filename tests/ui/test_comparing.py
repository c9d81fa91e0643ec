"""Grids: every cell is its own order, rendered as it would be alone, from the same noise."""

import json
from pathlib import Path

import pytest
from PIL import Image

from cmlora.errors import CmloraError
from cmlora.ui.arena import duels, entries, runs
from cmlora.ui.comparing import Cell, Run, fill, growing, methods_by_seeds, strength_by_strength
from cmlora.ui.jobs import Result, Ticket
from cmlora.ui.settings import Limits
from cmlora.ui.studio import Studio
from cmlora.ui.tab_compare import cell_name, compact, grid_html, wipe_html
from tests.ui.working import made, order

LIMITS = Limits()


def _filled(studio: Studio, sheet: object) -> tuple[list[Cell], Run]:
    values = [
        event.value
        for event in fill(studio, sheet, Ticket())  # type: ignore[arg-type]
        if isinstance(event, Result)
    ]
    return [v for v in values if isinstance(v, Cell)], values[-1]


def test_methods_by_seeds(warm: Studio) -> None:
    words = ["merge", "cmlora@uniform:2"]
    sheet = methods_by_seeds(order(), words, (7, 8), LIMITS)
    cells, run = _filled(warm, sheet)

    assert sheet.rows == ("merge", "cmlora@uniform:2")
    assert [(c.row, c.column) for c in cells] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [(c.picture.recipe.method, c.picture.recipe.seed) for c in cells] == [
        ("merge", 7),
        ("cmlora", 7),
        ("merge", 8),
        ("cmlora", 8),
    ]
    (alone,) = made(warm, method="merge", cache="none", seed=8)
    assert cells[2].picture.path.read_bytes() == alone.path.read_bytes()

    table = json.loads((run.folder / "results.json").read_text())
    assert table["complete"]
    assert [row["file"] for row in table["cells"]] == [c.picture.path.name for c in cells]
    assert cells[0].picture.macs is not None
    assert cells[1].picture.report.light
    with Image.open(run.grid) as image:
        assert image.width > 2 * 96

    assert runs(warm)[0] == run.folder.name
    found = duels(entries(warm, run.folder.name), seed=1)
    assert len(found) == 2
    assert {duel.left.unit for duel in found} == {"seed 7", "seed 8"}

    page = grid_html(sheet, cells[:3])
    assert page.count("<img") == 3
    assert page.count("<figure style") == 4
    wiped = wipe_html("a", cells[0], "b", cells[1])
    assert wiped.count("data:image/png") == 2
    assert 'aria-label="Wipe' in wiped


def test_strengths_form_a_plane(warm: Studio) -> None:
    sheet = strength_by_strength(order(), "cat", (0.5, 1.0), "hat", (0.0, 2.0), LIMITS)
    cells, _ = _filled(warm, sheet)
    found = {
        (lora["cat"], lora["hat"])
        for cell in cells
        for lora in [{x.name: x.weight for x in cell.picture.recipe.loras}]
    }
    assert found == {(0.5, 0.0), (0.5, 2.0), (1.0, 0.0), (1.0, 2.0)}
    assert sheet.rows == ("cat 0.5", "cat 1")


def test_loras_are_added_one_by_one(warm: Studio) -> None:
    sheet = growing(order(loras={"ink": 1.0, "cat": 0.5}), ["merge"], LIMITS)
    cells, _ = _filled(warm, sheet)
    assert [[lora.name for lora in cell.picture.recipe.loras] for cell in cells] == [
        ["ink"],
        ["cat", "ink"],
    ]
    assert cell_name(sheet, cells[1]) == "merge · 2 LoRAs"


def test_options_reach_the_methods_that_have_them(warm: Studio) -> None:
    sheet = methods_by_seeds(
        order(method="switch", options={"tau": "2"}), ["switch", "merge"], (0,), LIMITS
    )
    (first,), (second,) = sheet.orders
    assert first.options == {"tau": "2"}
    assert second.options == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods_by_seeds(order(), ["magic"], (0,), LIMITS), "unknown"),
        (lambda: methods_by_seeds(order(), [], (0,), LIMITS), "no method"),
        (lambda: methods_by_seeds(order(), ["merge"], range(99), LIMITS), "99 pictures"),
        (lambda: strength_by_strength(order(), "ink", (1,), "hat", (1,), LIMITS), "not selected"),
        (lambda: strength_by_strength(order(), "cat", (1,), "cat", (1,), LIMITS), "different"),
        (lambda: growing(order(loras={"cat": 1.0}), ["merge"], LIMITS), "two or more"),
    ],
)
def test_impossible_grids_are_refused(make: object, message: str) -> None:
    with pytest.raises(CmloraError, match=message):
        make()  # type: ignore[operator]


def test_a_mistake_in_one_cell_is_found_before_any_is_rendered(studio: Studio) -> None:
    sheet = strength_by_strength(order(), "cat", (1.0, 99.0), "hat", (1.0,), LIMITS)
    with pytest.raises(CmloraError, match="not between -10 and 10"):
        fill(studio, sheet, Ticket())
    assert not (studio.settings.out / "comparisons").exists()


def test_a_stopped_grid_keeps_its_cells(studio: Studio) -> None:
    ticket = Ticket()
    sheet = methods_by_seeds(order(), ["merge", "switch"], (0, 1), LIMITS)
    events = fill(studio, sheet, ticket)
    next(event for event in events if isinstance(event, Result))
    ticket.stop()
    with pytest.raises(CmloraError, match="stopped"):
        list(events)
    (folder,) = (studio.settings.out / "comparisons").iterdir()
    table = json.loads((folder / "results.json").read_text())
    assert not table["complete"]
    assert len(table["cells"]) >= 1
    assert all((folder / row["file"]).is_file() for row in table["cells"])


def test_results_that_name_other_files_are_refused(studio: Studio) -> None:
    folder = studio.settings.out / "comparisons" / "mine"
    folder.mkdir(parents=True)
    (Path(studio.settings.out) / "secret.png").write_bytes(b"secret")
    row = {"row": 0, "column": 0, "file": "../../secret.png", "scores": {}}
    (folder / "results.json").write_text(
        json.dumps({"rows": ["a"], "columns": ["b"], "cells": [row]})
    )
    with pytest.raises(CmloraError, match="cannot be read"):
        entries(studio, "mine")
    with pytest.raises(CmloraError, match="there is no comparison"):
        entries(studio, "../comparisons/mine")


def test_the_bar_stands_alone() -> None:
    from cmlora.ui.panels import stage

    assert "frame" not in compact(stage("", words="x", share=0.5, kind="busy"))
