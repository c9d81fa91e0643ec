"""The benchmark page of compositions with merged files in it, from a made-up measurement."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "composition.py"
PAGE = """# Compositions

3 pictures: 2 methods, 24 sets of 2 LoRAs, 60 sets of 3 LoRAs; seeds 0.

## Tables

| method | N = 2 |

## Plots

![x](x.svg)
"""
ROWS: list[dict[str, Any]] = [
    {"method": "live merge", "names": ["a", "b"], "each": [1, 0.5, 1, 1]},
    {"method": "ties", "names": ["a", "b"], "each": [0.5, 0, 0, 0], "bytes": 60, "sources": 80},
    {"method": "ties", "names": ["c", "b"], "each": [1, 1, 1, 1], "bytes": 40, "sources": 80},
    {"method": "ties", "names": list("abc"), "each": [0, 0, 0, 0.4], "bytes": 30, "sources": 120},
]


def call(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", list(map(str, (SCRIPT, *words))))
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_merging_methods_are_added_to_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, merged = tmp_path / "composition.md", tmp_path / "merged.json"
    page.write_text(PAGE)
    rows = [{**row, "seeds": 4, "learn": 0.25, "size": len(row["names"])} for row in ROWS]
    merged.write_text(json.dumps(rows))
    call(monkeypatch, "--merged", merged, "--out", tmp_path)
    text = page.read_text()
    assert "| method | N = 2 | N = 3 | file |" in text
    assert "| `live merge` | 0.875 |  | 1.00 |" in text
    assert "| `ties` | 0.562 | 0.100 | 0.50 |" in text
    assert "fewer sets than above, 2 of 2 LoRAs (above: 24), 1 of 3 LoRAs (above: 60)" in text
    assert "Learned methods had 25% of their usual steps." in text
    assert text.index("## Tables") < text.index("## Merged files") < text.index("## Plots")
    start, end = PAGE.split("## Plots")
    assert text.startswith(start)
    assert text.endswith("## Plots" + end)
    # once more it is replaced and not repeated
    call(monkeypatch, "--merged", merged, "--out", tmp_path)
    assert page.read_text() == text


def test_one_line_for_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "composition.md").write_text(PAGE)
    wrong = tmp_path / "wrong.json"
    for content, message in (
        ("{", "is not what merged.py writes"),
        ('[{"method": "ties"}]', "is not what merged.py writes"),
        ("[]", "holds no rows yet"),
    ):
        wrong.write_text(content)
        with pytest.raises(SystemExit):
            call(monkeypatch, "--merged", wrong, "--out", tmp_path)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(monkeypatch, "--out", tmp_path)
    assert "name a run" in capsys.readouterr().err
    assert (tmp_path / "composition.md").read_text() == PAGE
