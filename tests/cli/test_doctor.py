"""`cmlora doctor` as a user meets it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cmlora.cli.app import app
from tests import disk


def test_a_report_and_a_plot(lora_folder: Path, tmp_path: Path) -> None:
    files = [str(lora_folder / f"{name}.safetensors") for name in ("cat", "hat")]
    plot = tmp_path / "conflicts.svg"
    arguments = ["doctor", *files, "--plot", str(plot)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report["loras"]) == {"cat", "hat"}
    assert abs(report["pairs"][0]["cosine"]) < 0.5
    assert report["advice"]
    assert plot.read_text().startswith("<svg")
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    result = CliRunner().invoke(app, [*arguments, "--force"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "because" in result.stdout


@pytest.mark.parametrize(
    ("name", "message"), [("nan", "lora_"), ("missing", "not found"), ("other", "cannot be used")]
)
def test_one_line_for_a_mistake(lora_folder: Path, tmp_path: Path, name: str, message: str) -> None:
    tensors = load_file(lora_folder / "hat.safetensors")
    tensors[min(tensors)].fill_(torch.nan)
    save_file(tensors, tmp_path / "nan.safetensors")
    disk.save_lora(tmp_path, "other", wide=2)
    files = [str(lora_folder / "cat.safetensors"), str(tmp_path / f"{name}.safetensors")]
    result = CliRunner().invoke(app, ["doctor", *files])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len([line for line in result.stderr.splitlines() if line.strip()]) == 1
    assert message in result.stderr
    assert name in result.stderr
