"""The page about composition methods is written from a run."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from cmlora.eval.study import Study
from tests.eval.made import make_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("made") / "run")


def test_the_benchmark_is_written_from_a_run(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    script = Path(__file__).parent.parent.parent / "benchmarks" / "composition.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(study.folder), "--out", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out.strip()
    assert said.startswith("`cmlora@nonuniform` is number 2 of 5 by concepts found (0.")
    assert "ahead of it are `composite` (0.9" in said
    assert "it is behind some method by more than chance for N = " in said
    text = (tmp_path / "composition.md").read_text()
    assert said in text
    assert "**concepts found**" in text
    for name in re.findall(r"!\[.*?\]\((\S+)\)", text):
        assert (tmp_path / name).stat().st_size > 1000


def test_the_benchmark_can_leave_times_out(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(__file__).parent.parent.parent / "benchmarks" / "composition.py"
    words = [str(script), str(study.folder), "--out", str(tmp_path), "--untimed"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(script), run_name="__main__")
    text = (tmp_path / "composition.md").read_text()
    assert "No times: the machine had other work." in text
    assert "seconds" not in text + (tmp_path / "composition.csv").read_text()
    assert not (tmp_path / "composition_time.svg").exists()
