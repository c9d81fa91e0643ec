"""The merges of the embedded LoRAs, end to end from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cmlora.cli.app import app
from cmlora.emoji import weights
from cmlora.files import read

pytestmark = pytest.mark.slow
LORAS = ("character_1", "object_1")


def run(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calib") / "calib.safetensors"
    run("calib", *LORAS, "--steps", "2", "-o", path)
    return path


def drawn(path: Path, folder: Path) -> None:
    picture = folder / "merged.png"
    run("generate", "--lora", path, "--method", "merge", "--steps", "4", "--out", picture)
    assert picture.stat().st_size > 0


@pytest.mark.parametrize("method", ["lego", "pleas", "ziplora", "ties", "knots_ties"])
def test_closed_forms(method: str, calib: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    given: list[str | Path] = ["--calib", calib] if method in ("pleas", "ziplora") else []
    said = run("merge", *LORAS, "--method", method, *given, "-o", out)
    assert said["method"] == method
    drawn(out, tmp_path)


@pytest.mark.parametrize("method", ["concrete", "atlas", "ziplora_trained", "lorahub"])
def test_learned_methods_beside_their_control(method: str, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    length = "budget=20" if method == "lorahub" else "steps=20"
    said = run("merge", *LORAS, "--method", method, "--option", length, "-o", out)
    losses = said["losses"]
    assert losses["learned"] <= min(losses["sum"], losses["base"]) * 1.01
    assert losses["learned"] < losses["random"]
    assert len(read(out).updates) > 0
    drawn(out, tmp_path)


def test_a_pack_of_all(tmp_path: Path) -> None:
    out = tmp_path / "all.safetensors"
    run("pack", *weights.LORAS, "-p", "3", "-o", out)
    run("unpack", out, "--name", LORAS[0], "-o", tmp_path)
    unpacked = tmp_path / f"{LORAS[0]}.safetensors"
    assert out.stat().st_size < 11 * unpacked.stat().st_size
    drawn(unpacked, tmp_path)


def test_a_baked_composition_is_nearer_than_the_sum(tmp_path: Path) -> None:
    picture, out = tmp_path / "a.png", tmp_path / "baked.safetensors"
    loras = [f"--lora={name}" for name in LORAS]
    run("generate", *loras, "--method", "composite", "--steps", "6", "--out", picture)
    said = run("bake", picture, "-o", out, "--fit-steps", "20")
    assert said["distance"]["baked"] < said["distance"]["sum"]
    assert said["distance"]["baked"] < 1
    drawn(out, tmp_path)


def test_how_strong_they_may_be(calib: Path) -> None:
    found = run("analyze", "strength", *LORAS, "--calib", calib)
    assert [row["name"] for row in found] == [*LORAS, "all together"]
    assert all(row["safest"] is None or row["safest"] > 0 for row in found)


def test_a_healed_denoiser_answers_better(tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    said = run(
        "compress", weights.model_path(), "--keep", "0.6", "--prompt", "a red fox", "--heal", "20",
        "--out", out,
    )  # fmt: skip
    assert said["answers"]["healed"] < said["answers"]["compressed"]
    assert said["bytes_after"] < said["bytes_before"]
