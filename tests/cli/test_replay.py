"""`cmlora replay`, pictures of all formats, and compressed denoisers as models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from cmlora import container, pictures
from cmlora.adapters.compression import COMPRESSIONS
from cmlora.adapters.compression.model import compress, save
from cmlora.cli.app import app
from cmlora.errors import CmloraError
from cmlora.pipelines import library
from cmlora.pipelines.models import open_pipeline
from tests import tiny


def run(*arguments: str) -> Any:
    """The command's result; it must succeed."""
    result = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: str) -> str:
    """What a command says that must fail with one line."""
    result = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert len([line for line in result.stderr.splitlines() if line.strip()]) == 1
    return str(result.stderr)


@pytest.fixture
def made(model_folder: Path, lora_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "first.webp"
    where = ["--model", str(model_folder), "--lora-dir", str(lora_folder), "--out", str(path)]
    ask = ["--prompt", "a cat", "--steps", "2", "--method", "composite", "--seed", "3"]
    run("generate", *where, "--lora", "cat", "--lora", "hat:0.5", *ask)
    return path


def test_a_picture_is_made_again(made: Path, lora_folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved" / "deeper"
    moved.mkdir(parents=True)
    shutil.copy(lora_folder / "cat.safetensors", moved / "another name.safetensors")
    shutil.copy(lora_folder / "hat.safetensors", moved.parent / "cat.safetensors")
    result = run("replay", str(made), "--lora-dir", str(moved.parent))
    assert "byte for byte" in result.stderr
    again = made.with_name("first-again.webp")
    assert again.read_bytes() == made.read_bytes()
    target = tmp_path / "x.jpg"
    facts = run("replay", str(made), "--lora-dir", str(lora_folder), "--out", str(target), "--json")
    assert json.loads(facts.stdout)["identical"] is False
    assert pictures.read(target) == pictures.read(made)
    said = json.loads(run("replay", str(made), "--dry-run", "--json").stdout)
    assert said["recipe"]["method"] == "composite"


def test_the_picture_itself_is_not_replaced(made: Path, lora_folder: Path, tmp_path: Path) -> None:
    before = made.read_bytes()
    inside = tmp_path / "inside"
    inside.mkdir()
    for target in (made, inside / ".." / made.name):
        for command in (["replay", str(made)], ["generate", "--recipe", str(made)]):
            said = refused(*command, "--lora-dir", str(lora_folder), "--out", str(target))
            assert "is the picture that is made again" in said
    assert made.read_bytes() == before


def test_a_target_that_cannot_be_written_is_refused_before_the_work(
    made: Path, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    draw = ["generate", "--model", str(model_folder), "--method", "naive", "--prompt", "a cat"]
    for command in (draw, ["replay", str(made)]):
        said = refused(*command, "--out", str(tmp_path / "folder.png"))
        assert "this is a folder" in said
        assert "there is no folder" in refused(*command, "--out", str(tmp_path / "file" / "a.png"))
        # nobody writes there, not even root, to whom modes of folders say nothing
        assert "nothing can be written" in refused(*command, "--out", "/proc/a.png")


def test_what_is_no_picture_is_said_of_the_picture(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    (tmp_path / "a.json").write_text("{}")
    for name in (".", "a.gif", "a.json"):
        said = refused("replay", str(tmp_path / name))
        assert "--out" not in said
        assert str(tmp_path / name) in said


def test_a_recipe_refuses_options_about_the_picture(made: Path, lora_folder: Path) -> None:
    again = ["generate", "--recipe", str(made), "--lora-dir", str(lora_folder)]
    said = refused(*again, "--out", str(made.with_name("b.png")), "--steps", "30", "--lora", "cat")
    assert f"--lora, --steps: --recipe {made} says everything" in " ".join(said.split())
    assert "is not the one of the recipe" in refused(*again, "--model", "emoji")


def test_missing_loras_are_all_named(made: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = refused("replay", str(made), "--lora-dir", str(tmp_path / "empty"))
    assert "cat.safetensors" in said
    assert "hat.safetensors" in said
    assert "sha256" in said
    assert refused("replay", str(tmp_path / "no.png")).count("no.png") == 1
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    assert "other programs took that out" in refused("replay", str(tmp_path / "bare.png"))
    info = PngInfo()
    info.add_text("parameters", "a cat", zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "packed.png", pnginfo=info)
    assert "texts are compressed" in refused("replay", str(tmp_path / "packed.png"))


def test_another_programs_picture_is_told_again(
    model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    cat = lora_folder / "cat.safetensors"
    short = container.sha256(cat, container.header(cat).start)[:12]
    info = PngInfo()
    info.add_text(
        "parameters",
        "a cat <lora:Cat v2:0.8>\nNegative prompt: dog\nSteps: 2, Sampler: Euler a, CFG scale: 3, "
        f'Seed: 9, Size: 32x32, Lora hashes: "Cat v2: {short}", Version: v1.10.0',
    )
    path = tmp_path / "theirs.png"
    Image.new("RGB", (32, 32)).save(path, pnginfo=info)
    assert "name a model" in refused("replay", str(path))
    again = tmp_path / "ours.png"
    where = ["--model", str(model_folder), "--lora-dir", str(lora_folder), "--out", str(again)]
    result = run("replay", str(path), *where)
    assert "the same ingredients; the pixels are our own" in result.stderr
    recipe = pictures.read(again)
    assert (recipe.prompt, recipe.negative_prompt, recipe.seed) == ("a cat", "dog", 9)
    assert (recipe.scheduler, recipe.guidance_scale) == ("EulerAncestralDiscreteScheduler", 3)
    assert [(lora.file, lora.weight) for lora in recipe.loras] == [("cat.safetensors", 0.8)]


def test_what_is_left_out_of_anothers_text_is_said(model_folder: Path, tmp_path: Path) -> None:
    info, path = PngInfo(), tmp_path / "theirs.png"
    text = "Steps: 2, Sampler: DPM++ 2M SDE Karras, Seed: -1, Size: 32x32, Clip skip: 2"
    info.add_text("parameters", f"a cat\n{text}")
    Image.new("RGB", (32, 32)).save(path, pnginfo=info)
    result = run("replay", str(path), "--model", str(model_folder), "--json")
    left = ["Seed -1: 0 is used", "Clip skip 2 is left out"]
    assert json.loads(result.stdout)["left_out"] == left
    assert all(note in result.stderr for note in left)
    result = run("replay", str(path), "--model", str(model_folder))
    assert "the same ingredients" not in result.stderr
    assert "not all of its ingredients" in result.stderr
    recipe = pictures.read(tmp_path / "theirs-again.png")
    assert recipe.scheduler == "DPMSolverMultistepScheduler"
    assert recipe.scheduler_config["algorithm_type"] == "sde-dpmsolver++"


def test_strengths_and_curves_of_anothers_tags_are_replayed(
    model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    def replayed(name: str, tags: str) -> tuple[Any, str]:
        info, path = PngInfo(), tmp_path / f"{name}.png"
        info.add_text("parameters", f"a cat {tags}\nSteps: 2, Seed: 9, Size: 32x32")
        Image.new("RGB", (32, 32)).save(path, pnginfo=info)
        where = ["--model", str(model_folder), "--lora-dir", str(lora_folder)]
        result = run("replay", str(path), *where)
        return path.with_name(f"{name}-again.png"), result.stderr

    plain, _ = replayed("plain", "<lora:cat:0.8> <lora:hat:1>")
    assert pictures.read(plain).schedule == ""
    both, said = replayed("both", "<lora:cat:0.2:0.8> <lora:hat:0@0,1@0.5>")
    recipe = pictures.read(both)
    assert recipe.schedule == "<lora:cat:te=0.2:unet=0.8> <lora:hat:unet=0@0,1@0.5>"
    assert "LoRA hat: its curve is for the denoiser" in said
    assert Image.open(both).tobytes() != Image.open(plain).tobytes()
    info = PngInfo()
    info.add_text("parameters", "a cat <lora:cat:strong>\nSteps: 2, Seed: 9, Size: 32x32")
    path = tmp_path / "wrong.png"
    Image.new("RGB", (32, 32)).save(path, pnginfo=info)
    assert "'strong' is not a number" in refused("replay", str(path), "--model", "emoji")
    assert "strong" in run("replay", str(path), "--dry-run").stdout


def test_hashes_are_whole_or_their_first_digits(lora_folder: Path) -> None:
    cat = lora_folder / "cat.safetensors"
    whole = container.sha256(cat)
    short = container.sha256(cat, container.header(cat).start)[:12]
    for digest in (whole, whole[:10], short):
        assert library.by_hash([("other", digest)], folder=lora_folder) == [cat]
    for digest in ("", "0" * 64, whole[:4]):
        with pytest.raises(CmloraError, match="other"):
            library.by_hash([("other", digest)], folder=lora_folder)


def test_a_compressed_denoiser_is_a_model(model_folder: Path, tmp_path: Path) -> None:
    pipe = open_pipeline(model_folder)
    compress(pipe.unet, COMPRESSIONS["svd"].object, 0.5, least=8)
    path = tmp_path / "small.safetensors"
    save(pipe.unet, path)
    opened = open_pipeline(path, config=str(model_folder))
    opened.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.run(opened, steps=2), tiny.run(pipe, steps=2))
    with pytest.raises(CmloraError, match="give the diffusers folder of its model"):
        open_pipeline(path)
    out = ["--out", str(tmp_path / "a.png"), "--prompt", "a cat", "--steps", "2"]
    model = ["--model", str(path), "--config", str(model_folder), "--method", "naive"]
    run("generate", *model, *out)
    again = ["--out", str(tmp_path / "b.png"), "--config", str(model_folder)]
    run("replay", str(tmp_path / "a.png"), *again)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
