"""Commands that learn or measure on a model: `calib`, `bake`, and learning methods of `merge`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cmlora.cli.learned import LEARNERS
from cmlora.files import read, write
from cmlora.pipelines.learning import LEARNED
from tests import tiny
from tests.calling import complaint, run, run_json


def test_the_command_knows_what_learns() -> None:
    assert tuple(LEARNED) == LEARNERS


def test_calibration_is_measured_once_and_used_by_all(
    model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    calib, out = tmp_path / "calib.safetensors", tmp_path / "out.safetensors"
    here: list[str | Path] = ["--lora-dir", lora_folder]
    said = run_json(
        "calib", "cat", "hat", "--model", model_folder, *here, "--steps", "2", "-o", calib
    )
    assert set(said["modules"]) == {"the model alone", "cat", "hat"}
    assert len(set(said["modules"].values())) == 1
    assert said["bytes"] == calib.stat().st_size
    for method in ("pleas", "ziplora"):
        given: list[str | Path] = ["--method", method, "--calib", calib, "--force", "-o", out]
        report = run_json("merge", "cat:0.8", "hat", *here, *given)
        assert report["method"] == method
        assert read(out).updates.keys() == read(lora_folder / "cat.safetensors").updates.keys()
    asked: list[str | Path] = [
        "merge",
        "cat",
        "ink",
        *here,
        "--method",
        "pleas",
        "-o",
        out,
        "--force",
    ]
    assert "--calib FILE" in complaint(asked)
    assert "it knows cat, hat: measure this one" in complaint([*asked, "--calib", calib])
    assert "is no calibration data" in complaint(
        [*asked, "--calib", lora_folder / "ink.safetensors"]
    )
    assert "--force replaces it" in complaint(["calib", "cat", *here, "-o", calib])


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=[] if m == "concrete" else pytest.mark.slow) for m in LEARNERS],
)
def test_learning_from_the_command_line(
    method: str, model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    length = "budget=3" if method == "lorahub" else "steps=2"
    arguments: list[str | Path] = ["merge", "cat:0.5", "hat:0.5", "--lora-dir", lora_folder]
    arguments += ["--model", model_folder, "--option", length, "--rank", "3", "-o", out]
    arguments += ["--method", method, "--questions", "1"]
    said = run_json(*arguments)
    assert said["losses"].keys() == {"learned", "sum", "mean", "base", "random"}
    assert said["losses"]["base"] == pytest.approx(1)
    assert 1 <= said["rank"] <= 3
    assert said["error"] > 0
    assert 0 <= said["notes"]["lost_to_rank"] < 1
    assert {"errors", "bytes", "seconds", "warnings"} <= said.keys()
    merged = read(out)
    assert max(update.rank for update in merged.updates.values()) <= 3
    recipe = json.loads(merged.metadata["cmlora.merge"])
    assert (recipe["method"], recipe["weights"]) == (method, [0.5, 0.5])
    assert recipe["losses"] == said["losses"]
    assert merged.triggers == ("the cat", "the hat")
    pipe = tiny.sd15()
    pipe.load_lora_weights(str(out))
    assert tiny.run(pipe, steps=1).isfinite().all()


def test_learning_from_pictures(model_folder: Path, lora_folder: Path, tmp_path: Path) -> None:
    refs, out = tmp_path / "refs", tmp_path / "out.safetensors"
    refs.mkdir()
    for index in range(1):
        Image.new("RGB", (40, 40), (200 * index, 90, 30)).save(refs / f"{index}.png")
    arguments: list[str | Path] = ["merge", "cat", "hat", "--lora-dir", lora_folder, "-o", out]
    arguments += [
        "--method",
        "atlas",
        "--model",
        model_folder,
        "--option",
        "steps=3",
        "--questions",
        "1",
    ]
    wanted: list[str | Path] = ["--objective", "denoise_mse", "--refs", refs, "--no-control"]
    said = run_json(*arguments, *wanted)
    assert said["losses"]["learned"] <= said["losses"]["base"]
    arguments += ["--force"]
    told = run(*arguments, *wanted)
    assert "distance from the weighted sum" in told
    assert "the model alone" in told
    assert "belong together" in complaint([*arguments, "--refs", refs])
    assert "expected distill, " in complaint([*arguments, "--objective", "beauty"])
    assert "embedded model's CLIP" in complaint([*arguments, "--objective", "clip_score"])
    assert "no option 'density'" in complaint([*arguments, "--density", "0.5"])
    empty = tmp_path / "none"
    empty.mkdir()
    assert "holds no pictures" in complaint(
        [*arguments, "--objective", "denoise_mse", "--refs", empty]
    )


def picture(model_folder: Path, lora_folder: Path, path: Path, *extra: str) -> Path:
    loras = [f"--lora={lora_folder / name}.safetensors" for name in ("cat", "hat")]
    run(
        "generate", "--model", model_folder, *loras, "--steps", "2", *extra,
        "--out", path, "--guidance", "1",
    )  # fmt: skip
    return path


@pytest.mark.parametrize(
    "method",
    ["composite", *(pytest.param(m, marks=pytest.mark.slow) for m in ("cmlora", "switch"))],
)
def test_a_composition_is_baked(
    method: str, model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    png = picture(model_folder, lora_folder, tmp_path / "a.png", "--method", method)
    out = tmp_path / "baked.safetensors"
    arguments: list[str | Path] = ["bake", png, "--lora-dir", lora_folder, "-o", out]
    said = run_json(*arguments, "--fit-steps", "3")
    distance = said["distance"]
    assert distance["baked"] < min(1.0, distance["sum"])
    assert len(said["steps"]) == 2
    assert (sum(d * d for d in said["steps"]) / 2) ** 0.5 == pytest.approx(distance["baked"])
    baked = read(out)
    assert json.loads(baked.metadata["cmlora.baked"])["method"] == method
    assert baked.metadata["modelspec.merged_from"] == "cat,hat"
    assert "--force" in complaint(arguments)


def test_a_merge_is_baked_exactly(model_folder: Path, lora_folder: Path, tmp_path: Path) -> None:
    loras = tmp_path / "loras"
    loras.mkdir()
    for name in ("cat", "hat"):
        known = {"cmlora.base": "tiny", "modelspec.architecture": name}
        lora = read(lora_folder / f"{name}.safetensors")
        write(replace(lora, metadata=known), loras / f"{name}.safetensors")
    png = picture(model_folder, loras, tmp_path / "a.png", "--method", "merge")
    out = tmp_path / "baked.safetensors"
    arguments: list[str | Path] = ["bake", png, "--lora-dir", loras, "-o", out, "--force"]
    said = run_json(*arguments, "--fit", "none")
    assert said["distance"]["baked"] == said["distance"]["sum"] < 1e-4
    assert said["distance"]["mean"] > 0.1
    # what all files say of their model stays, what they disagree on does not
    assert read(out).metadata["cmlora.base"] == "tiny"
    assert "modelspec.architecture" not in read(out).metadata
    most = said["rank"]
    assert f"these LoRAs allow 1 to {most}" in complaint([*arguments, "--rank", str(most + 1)])
    assert f"these LoRAs allow 1 to {most}" in complaint([*arguments, "--rank", "0"])
    small = run_json(*arguments, "--rank", "1", "--fit", "strengths", "--fit-steps", "2")
    assert small["rank"] == 1
    fitted = run_json(*arguments, "--fit-steps", "2")
    assert fitted["distance"]["baked"] < 1e-4


def test_what_cannot_be_baked(model_folder: Path, lora_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    assert "recipe" in complaint(["bake", plain, "-o", out])
    naive = picture(model_folder, lora_folder, tmp_path / "n.png", "--method", "naive")
    said = complaint(["bake", naive, "--lora-dir", lora_folder, "-o", out])
    assert "is the model alone" in said
    assert "cannot read" in complaint(["bake", tmp_path / "none.json", "-o", out])
    assert not out.exists()


@pytest.mark.slow
def test_learnt_numbers_do_not_depend_on_the_global_generator(
    model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    values = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        out = tmp_path / f"{seed}.safetensors"
        run(
            "merge", "cat", "hat", "--lora-dir", lora_folder, "--method", "concrete", "-o", out,
            "--model", model_folder, "--option", "steps=2", "--no-control", "--name", "x",
            "--questions", "1",
        )  # fmt: skip
        values.append(out.read_bytes())
    assert values[0] == values[1]
