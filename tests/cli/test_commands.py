"""The sub-commands on a tiny model: pictures, replay, JSON on stdout and nothing else there."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from cmlora.cli.app import app
from cmlora.eval.variants import USUAL
from cmlora.strategies import METHODS
from tests import disk, tiny
from tests.calling import complaint, run, run_json
from tests.single_file import save_single_file

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.fixture
def generate(model_folder: Path, lora_folder: Path) -> list[str]:
    model = ["--model", str(model_folder), "--lora-dir", str(lora_folder)]
    loras = ["--lora", "cat", "--lora", "hat:0.5"]
    return ["generate", *model, *loras, "--prompt", "a cat", "--steps", "4", "--seed", "3"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_json(name: str) -> None:
    said = run(name, "--help")
    assert f"cmlora {name}" in said
    assert "Example:" in said
    assert "--json" in said or name == "ui"  # a server has nothing to say to programs here


def test_the_panels() -> None:
    said = run("--help")
    assert [said.index(panel) for panel in ("Pictures", "LoRA files", "Studies")] == sorted(
        said.index(panel) for panel in ("Pictures", "LoRA files", "Studies")
    )
    assert re.search(r"\d+\.\d+", run("--version"))


@pytest.mark.parametrize("method", ["naive", "merge", "composite", "cmlora"])
def test_a_picture_replays_byte_for_byte(
    generate: list[str], lora_folder: Path, tmp_path: Path, method: str
) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    made = run_json(*generate, "--method", method, "--out", str(first))
    assert made["file"] == str(first)
    assert made["report"]["method"] == method
    replay = ["generate", "--recipe", str(first), "--lora-dir", str(lora_folder)]
    run(*replay, "--out", str(again))
    assert again.read_bytes() == first.read_bytes()


def test_a_model_in_one_file(model_folder: Path, lora_folder: Path, tmp_path: Path) -> None:
    path = save_single_file(tiny.sd15(), tmp_path / "model.safetensors")
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    common = ["--config", str(model_folder), "--lora-dir", str(lora_folder)]
    loras = ["--lora", "cat", "--prompt", "a cat", "--steps", "2"]
    run("generate", "--model", str(path), *common, *loras, "--out", str(first))
    run("generate", "--recipe", str(first), *common, "--out", str(again))
    assert again.read_bytes() == first.read_bytes()


def test_weight_seed_and_prompt_make_a_difference(generate: list[str], tmp_path: Path) -> None:
    variations: list[list[str]] = [[], ["--seed", "4"], ["--prompt", "ink"], ["--lora", "ink:2"]]
    pictures = set()
    for number, extra in enumerate(variations):
        path = tmp_path / f"{number}.png"
        run(*generate, *extra, "--out", str(path))
        with Image.open(path) as image:
            pictures.add(image.tobytes())
    assert len(pictures) == len(variations)


@pytest.mark.parametrize("spelt", ["ink v1.5-b", "ink_v1_5_b"])
@pytest.mark.parametrize("named", [True, False])
def test_tags_go_by_the_name_of_the_file_or_of_the_adapter(
    generate: list[str], lora_folder: Path, tmp_path: Path, spelt: str, named: bool
) -> None:
    folder = tmp_path / "loras"
    shutil.copytree(lora_folder, folder)
    file = folder / "ink v1.5-b.safetensors"
    (folder / "ink.safetensors").rename(file)
    plain, tagged = tmp_path / "plain.png", tmp_path / "tagged.png"
    common = [*generate, "--lora-dir", str(folder)]
    run(*common, "--prompt", "a cat", "--lora", f"{file}:0.5", "--out", str(plain))
    if not named and spelt != file.stem:
        assert "did you mean" in complaint([*common, "--prompt", f"a cat <lora:{spelt}:0.5>"])
        return
    given = ["--lora", str(file)] if named else []
    run(*common, *given, "--prompt", f"a cat <lora:{spelt}:0.5>", "--out", str(tagged))
    with Image.open(plain) as first, Image.open(tagged) as second:
        assert first.tobytes() == second.tobytes()


def test_a_changed_lora_is_not_replayed(
    generate: list[str], lora_folder: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "a.png"
    run(*generate, "--out", str(picture))
    changed = tmp_path / "loras"
    changed.mkdir()
    shutil.copy(lora_folder / "cat.safetensors", changed)
    disk.save_lora(changed, "hat", strength=0.7)
    replay = ["generate", "--recipe", str(picture), "--lora-dir", str(changed)]
    result = CliRunner().invoke(app, [*replay, "--out", str(tmp_path / "b.png")])
    assert result.exit_code == 2
    assert "hat.safetensors" in result.stderr


def test_triggers_stand_in_for_a_prompt(
    model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    loras = ["--lora", "hat", "--lora", "cat", "--lora-dir", str(lora_folder)]
    out = ["--steps", "2", "--out", str(tmp_path / "a.png")]
    made = run_json("generate", "--model", str(model_folder), *loras, *out)
    assert made["recipe"]["prompt"] == "the hat, the cat"


def test_compare_fills_a_table(model_folder: Path, lora_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_json(
        *("compare", "--model", str(model_folder), "--lora-dir", str(lora_folder)),
        *("--loras", "cat,hat:0.8,ink", "--methods", "naive,merge,composite,cmlora@uniform:2"),
        *("--seeds", "1,5", "--steps", "6", "--prompt", "a cat", "--out", str(out)),
    )
    labels = ["naive", "merge", "composite", "cmlora@uniform:2"]
    assert [row["label"] for row in result["methods"]] == labels
    assert result["complete"]
    assert json.loads((out / "results.json").read_text())["methods"] == result["methods"]
    by = {row["label"]: row for row in result["methods"]}
    full, light = result["pass_macs"]["full"], result["pass_macs"]["light"]
    assert by["composite"]["macs_per_step"] == 3 * full
    assert by["merge"]["macs_per_step"] == full
    cached = by["cmlora@uniform:2"]
    assert cached["light_passes"] > 0
    assert cached["full_passes"] + cached["light_passes"] == 3 * 6
    calls = cached["full_passes"] * full + cached["light_passes"] * light
    assert cached["macs_per_step"] == pytest.approx(calls / 6)
    pictures = {image["file"] for row in result["methods"] for image in row["images"]}
    assert len(pictures) == 8
    assert {path.name for path in out.iterdir()} == {*pictures, "grid.png", "results.json"}


def test_compared_pictures_are_those_of_generate(
    generate: list[str], model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    """Initial latents depend on the seed alone: not on the method, nor on what came before."""
    out = tmp_path / "out"
    run(
        *("compare", "--model", str(model_folder), "--lora-dir", str(lora_folder)),
        *("--loras", "cat,hat:0.5", "--methods", "merge,switch", "--seeds", "2-3"),
        *("--steps", "4", "--prompt", "a cat", "--out", str(out)),
    )
    alone = tmp_path / "alone.png"
    run(*generate, "--method", "switch", "--out", str(alone))
    assert (out / "switch_3.png").read_bytes() == alone.read_bytes()


def test_an_option_reaches_the_methods_that_have_it(
    model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    result = run_json(
        *("compare", "--model", str(model_folder), "--lora-dir", str(lora_folder)),
        *("--loras", "cat,hat", "--methods", "merge,switch", "--option", "tau=1"),
        *("--seeds", "0", "--steps", "4", "--prompt", "a", "--out", str(tmp_path / "out")),
    )
    assert [row["options"] for row in result["methods"]] == [{}, {"tau": 1}]


def test_cost_without_a_model() -> None:
    result = run_json("cost", "--loras", "2", "--steps", "8", "--methods", "merge,composite")
    assert [row["macs_per_step"] / result["full"] for row in result["methods"]] == [1, 2]
    assert result["size"] == [512, 512]
    said = run("cost", "--loras", "2", "--methods", "merge,cmlora@nonuniform", "--size", "64")
    assert "cmlora@nonuniform" in said


def test_square_brackets_are_shown_as_they_are(lora_folder: Path, tmp_path: Path) -> None:
    """Options of variants have them, and so have files; neither is markup."""
    variant = "cmlora[order=high_first]@nonuniform"
    assert variant in run("cost", "--loras", "2", "--methods", variant, "--size", "64")
    odd = tmp_path / "two["
    odd.mkdir()
    here: list[str | Path] = ["--lora-dir", lora_folder]
    assert "two[/b].safetensors" in run("merge", "cat", "hat", *here, "-o", odd / "b].safetensors")
    refused = complaint(["merge", "cat", "hat", *here, "-o", odd / "b].safetensors"])
    assert "two[/b].safetensors" in refused


def test_cost_of_a_folder_is_its_configurations(model_folder: Path) -> None:
    result = run_json("cost", "--model", str(model_folder), "--loras", "2")
    assert result["size"] == [32, 32]
    assert {row["label"].split("@")[0] for row in result["methods"]} == {
        usual.split("@")[0] for usual in USUAL
    }


def test_methods_lists_the_registry() -> None:
    result = run_json("methods")
    assert [row["name"] for row in result["methods"]] == list(METHODS)
    said = run("methods")
    assert all(name in said for name in METHODS)


def test_inspect(lora_folder: Path) -> None:
    facts = run_json("inspect", str(lora_folder / "cat.safetensors"))
    assert facts[0]["name"] == "cat"
    assert facts[0]["triggers"] == ["the cat"]
    assert "the cat" in run("inspect", str(lora_folder / "cat.safetensors"))


def test_profile_writes_a_card(model_folder: Path, tmp_path: Path) -> None:
    path = disk.save_lora(tmp_path, "cat")
    common = ["profile", str(path), "--model", str(model_folder), "--steps", "3", "--seeds", "0"]
    untouched = run_json(*common, "--no-card")
    assert 0 <= untouched["cat"]["frequency"] <= 1
    assert [p.name for p in tmp_path.iterdir()] == ["cat.safetensors"]
    assert "cat" in run(*common)
    assert (tmp_path / "cat.safetensors.profile.json").exists()


def test_env() -> None:
    facts = run_json("env")
    assert facts["library"]["torch"] in run("env")
