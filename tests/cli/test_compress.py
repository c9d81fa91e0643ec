"""`cmlora compress` as a user meets it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cmlora.adapters.compression.model import load, model_bytes
from cmlora.cli.app import app
from cmlora.files import read
from tests import tiny


def test_a_smaller_file(lora_folder: Path, tmp_path: Path) -> None:
    source, small = lora_folder / "cat.safetensors", tmp_path / "small.safetensors"
    arguments = ["compress", str(source), "--method", "fixed", "--keep", "1", "--out", str(small)]
    plot = tmp_path / "small.svg"
    result = CliRunner().invoke(app, [*arguments, "--json", "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    assert "rank kept" in plot.read_text()
    report = json.loads(result.stdout)
    assert report["bytes_after"] == small.stat().st_size < source.stat().st_size
    assert 0 < report["error"] < 1
    assert report["rank"] == [1, 1]
    assert read(small).triggers == ("the cat",)
    again = CliRunner().invoke(app, arguments)
    assert (again.exit_code, again.stdout) == (2, "")
    assert "--force" in again.stderr
    result = CliRunner().invoke(app, [*arguments, "--force", "--half"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "norm lost" in result.stdout


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--method", "enrgy"], "did you mean energy"),
        (["--keep", "1.5"], "up to 1"),
        (["--keep", "nan"], "finite"),
        (["--out", "small.bin"], ".safetensors"),
        (["--plot", "small.pdf"], ".png or .svg"),
        (["--plot", "/nowhere/small.svg"], "does not exist"),
        (["--out", "/nowhere/small.safetensors"], "cannot write"),
    ],
)
def test_one_line_for_a_mistake(
    lora_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    extra: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = str(lora_folder / "cat.safetensors")
    result = CliRunner().invoke(app, ["compress", source, "--out", "a.safetensors", *extra])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.strip()]) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_source_is_never_replaced(lora_folder: Path) -> None:
    source = str(lora_folder / "cat.safetensors")
    result = CliRunner().invoke(app, ["compress", source, "--out", source, "--force"])
    assert result.exit_code == 2
    assert "the LoRA itself" in result.stderr


def test_a_smaller_denoiser(model_folder: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    arguments = ["compress", str(model_folder), "--keep", "0.7", "--out", str(small), "--json"]
    arguments += ["--spread", "budget", "--prompt", "a cat"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["bytes_after"] < report["bytes_before"]
    assert all(row["after"] < row["before"] for row in report["modules"].values())
    denoiser = tiny.sd15().unet
    load(denoiser, small)
    assert model_bytes(denoiser) == report["bytes_after"]


def test_a_denoiser_is_trained_around_its_compression(model_folder: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    arguments = ["compress", str(model_folder), "--keep", "0.6", "--out", str(small), "--json"]
    steps = ["--prune", "2", "--nest", "2", "--cut", "0.8", "--heal", "12", "--prompt", "a cat"]
    result = CliRunner().invoke(app, [*arguments, *steps])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    answers = report["answers"]
    assert list(answers) == ["pruned", "compressed", "nested", "cut", "healed"]
    assert answers["healed"] < answers["cut"]
    denoiser = tiny.sd15().unet
    load(denoiser, small)
    assert model_bytes(denoiser) == report["bytes_after"] < report["bytes_before"]


def test_measured_once_and_spread_by_trying(model_folder: Path, tmp_path: Path) -> None:
    small, calib = tmp_path / "small.safetensors", tmp_path / "calib.safetensors"
    measure = ["calib", "--model", str(model_folder), "--prompt", "a cat", "--all", "--steps", "1"]
    result = CliRunner().invoke(app, [*measure, "-o", str(calib)])
    assert result.exit_code == 0, result.output
    arguments = ["compress", str(model_folder), "--keep", "0.7", "--out", str(small), "--json"]
    result = CliRunner().invoke(app, [*arguments, "--calib", str(calib), "--spread", "knapsack"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["bytes_after"] < report["bytes_before"]
    assert report["answers"] == {}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--heal", "3"], "give a --prompt"),
        (["--cut", "2"], "up to 1"),
        (["--prune", "-1"], "count steps"),
        (["--method", "energy"], "unknown compression method"),
        (["--spread", "evenly"], "welore, budget, knapsack"),
        (["--half"], "LoRA files"),
        (["--keep", "0"], "above 0"),
    ],
)
def test_one_line_for_a_mistake_with_a_model(
    model_folder: Path, tmp_path: Path, extra: list[str], message: str
) -> None:
    small = tmp_path / "small.safetensors"
    result = CliRunner().invoke(app, ["compress", str(model_folder), "--out", str(small), *extra])
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert not small.exists()
