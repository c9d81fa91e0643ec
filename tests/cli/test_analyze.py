"""`cmlora analyze library` as a user meets it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cmlora.cli.app import app
from cmlora.files import write
from tests.calling import run_json
from tests.synthetic import lora


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
    rate, gain = (f"{found[key]:.2f}" for key in ("coding_rate", "coding_gain"))
    assert f"coding rate {rate} nats, of which the clusters save {gain}" in result.stdout
    by_eye = CliRunner().invoke(app, ["analyze", "--help"], env={"COLUMNS": "200"}).stdout
    assert "cmlora analyze strength" in by_eye


def test_a_library_with_a_file_that_says_less(tmp_path: Path) -> None:
    layers = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q"
    for seed, (name, count) in enumerate({"whole": 2, "double": 1}.items()):
        modules = tuple(f"transformer.{layer}" for layer in layers[:count])
        write(lora(name, seed, modules), tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("whole", "double")]
    family = run_json("analyze", "library", tmp_path)["family"]
    assert family == run_json("doctor", *files)["family"]
    assert "FLUX" in family
    assert run_json("analyze", "align", *files)["loras"] == ["whole", "double"]


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
