"""`cmlora analyze library` as a user meets it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cmlora.cli.app import app


def test_a_library(lora_folder: Path, tmp_path: Path) -> None:
    table, plot = tmp_path / "scores.csv", tmp_path / "like.png"
    table.write_text("one,other,score\ncat,hat,0.5\n")
    arguments = ["analyze", "library", str(lora_folder), "--scores", str(table)]
    result = CliRunner().invoke(app, [*arguments, "--plot", str(plot), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert sorted(name for group in found["clusters"] for name in group) == ["cat", "hat", "ink"]
    assert found["duplicates"] == []
    assert {pair["one"] for pair in found["guesses"]["pairs"]} == {"cat", "hat"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "try cat with ink" in result.stdout


@pytest.mark.parametrize(
    ("what", "table", "message"),
    [
        ("pictures", "", "known: library, align, strength"),
        ("library", "cat,hat,0.5\ncat,ink", "line 2"),
        ("library", "cat,hat,nan", "line 1"),
        ("library", "cat,dog,1", "dog"),
        ("library", "", "no pair has a score"),
    ],
)
def test_one_line_for_a_mistake(
    lora_folder: Path, tmp_path: Path, what: str, table: str, message: str
) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(table)
    result = CliRunner().invoke(app, ["analyze", what, str(lora_folder), "--scores", str(path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.strip()]) == 1


def test_an_empty_folder(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["analyze", "library", str(tmp_path)])
    assert result.exit_code == 2
    assert "holds 0" in result.stderr
