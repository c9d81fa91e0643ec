"""`cmlora compress` as a user meets it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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
        (["--method", "fixed", "--keep", "3"], "rank 3 is not possible; this LoRA allows 1 to 2"),
        (["--method", "complete"], "no updates with entries of zero"),
        (["--method", "complete", "--keep", "inf"], "a rank of 1 or more, not inf"),
        (["--method", "complete", "--half"], "once more"),
        (["--lasso", "0.1"], "for a model's folder"),
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


@pytest.mark.parametrize("keep", ["0.6", "0.99"])
def test_a_denoiser_in_half_precision_keeps_its_share(keep: str, tmp_path: Path) -> None:
    folder, small = tmp_path / "half", tmp_path / "small.safetensors"
    pipe = tiny.sd15()
    pipe.to(torch.float16)
    pipe.save_pretrained(folder)
    arguments = ["compress", str(folder), "--method", "rocket", "--keep", keep]
    result = CliRunner().invoke(app, [*arguments, "--out", str(small), "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["modules"].values()
    assert rows
    assert all(row["after"] < row["before"] for row in rows)
    assert all(row["after"] <= float(keep) * row["before"] for row in rows)
    denoiser = tiny.sd15().unet
    load(denoiser, small)
    assert denoiser.dtype == torch.float16
    assert model_bytes(denoiser) == sum(t.nbytes for t in load_file(small).values())


def test_a_denoiser_is_trained_around_its_compression(model_folder: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    arguments = ["compress", str(model_folder), "--keep", "0.6", "--out", str(small), "--json"]
    steps = ["--prune", "2", "--nest", "2", "--cut", "0.8", "--heal", "24", "--prompt", "a cat"]
    steps += ["--prompt", "a hat, a dog", "--prompt", "ink 3 trees"]
    steps += ["--lasso", "1e-6", "--excess", "0.1"]
    result = CliRunner().invoke(app, [*arguments, *steps])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    answers = report["answers"]
    assert list(answers) == ["pruned", "compressed", "nested", "cut", "healed"]
    assert answers["pruned"] > 0
    assert answers["healed"] < answers["cut"]
    denoiser = tiny.sd15().unet
    load(denoiser, small)
    assert model_bytes(denoiser) == report["bytes_after"] < report["bytes_before"]


def test_the_embedded_model_is_one_by_its_name(tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    arguments = ["compress", "emoji", "--method", "mxfp4", "--keep", "0.9", "--out", str(small)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bytes_after"] > 0
    assert small.stat().st_size > 0


def test_a_masked_update_is_completed(tmp_path: Path) -> None:
    source, whole = tmp_path / "masked.safetensors", tmp_path / "whole.safetensors"
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(48, 2, generator=g) @ torch.randn(2, 40, generator=g)
    masked = torch.where(torch.rand(48, 40, generator=g) < 0.5, truth, 0.0)
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.diff"
    save_file({key: masked}, source)
    arguments = ["compress", str(source), "--method", "complete", "--out", str(whole), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["rank"] == [2, 2]
    assert report["error"] < 1e-5
    assert report["bytes_after"] < report["bytes_before"]
    (found,) = read(whole).updates.values()
    assert float((found.delta() - truth).norm() / truth.norm()) < 1e-5
    said = CliRunner().invoke(app, [*arguments, "--keep", "40", "--force"])
    assert said.exit_code == 2
    assert "the known entries allow 1 to" in said.stderr


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
        (["--lasso", "1e-4"], "--lasso is for --nest"),
        (["--excess", "1"], "--excess is for --heal"),
        (["--excess", "-1"], "0 or more"),
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
