"""Recipes: complete, carried out exactly, and refused where something has changed."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from peft import LoraConfig, get_peft_model

from cmlora.errors import CmloraError
from cmlora.frequency.card import Profile, write_card
from cmlora.frequency.profile import base_id
from cmlora.peft_config import BESIDE
from cmlora.pipelines.native import native_execution, native_threads
from cmlora.pipelines.render import (
    Wish,
    assemble,
    pass_cost,
    render,
    restore,
    threads,
    write_recipe,
)
from cmlora.recipe import Recipe
from tests import disk, tiny

WISH = Wish("a cat", steps=4, seed=3)


def recipe(model: Path, loras: Path, wish: Wish = WISH) -> Recipe:
    pipe = assemble(model, [("ink", 0.7), ("cat", 1.0)], folder=loras, roles={"ink": "high"})
    return write_recipe(pipe, wish)


def test_what_is_left_out_is_filled_in(model_folder: Path, lora_folder: Path) -> None:
    made = recipe(model_folder, lora_folder)
    assert (made.width, made.height, made.guidance_scale) == (32, 32, 7.5)
    assert (made.method, made.cache, made.scheduler) == ("cmlora", "nonuniform", "DDIMScheduler")
    assert [(lora.name, lora.weight, lora.role) for lora in made.loras] == [
        ("cat", 1.0, None),
        ("ink", 0.7, "high"),
    ]
    assert all(len(lora.sha256) == 64 for lora in made.loras)


def test_through_json_and_back_it_is_the_same_picture(
    model_folder: Path, lora_folder: Path
) -> None:
    pipe = assemble(model_folder, [("ink", 0.7), ("cat", 1.0)], folder=lora_folder)
    pipe.pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    made = write_recipe(pipe, dataclasses.replace(WISH, method="switch", options={"tau": "1"}))
    first = render(pipe, made)
    again = Recipe.from_json(made.to_json())
    second = render(restore(again, folder=lora_folder), again)
    assert second.image.tobytes() == first.image.tobytes()
    assert second.recipe.scheduler == "EulerDiscreteScheduler"
    assert second.report.full == first.report.full


def test_loading_order_does_not_matter(model_folder: Path, lora_folder: Path) -> None:
    pictures, recipes = set(), set()
    for order in (["cat", "hat", "ink"], ["ink", "cat", "hat"]):
        pipe = assemble(model_folder, [(name, 1.0) for name in order], folder=lora_folder)
        made = render(pipe, write_recipe(pipe, dataclasses.replace(WISH, method="composite")))
        pictures.add(made.image.tobytes())
        recipes.add(made.recipe.digest())
    assert len(pictures) == len(recipes) == 1


def test_turns_are_those_of_the_pipeline() -> None:
    pipe = assemble("emoji", [("background_1", 1.0), ("character_1", 1.0)])
    wish = Wish("zorbo on a dunlo", method="switch", steps=3, seed=5, guidance_scale=1.0)
    made = write_recipe(pipe, wish)
    assert made.order == ("character_1", "background_1")
    called = pipe(
        wish.prompt,
        composition="switch",
        seed=5,
        num_inference_steps=3,
        guidance_scale=1.0,
        width=made.width,
        height=made.height,
    )
    assert render(pipe, made).image.tobytes() == called.images[0].tobytes()
    by_name = dataclasses.replace(made, order=())
    assert render(pipe, by_name).image.tobytes() != called.images[0].tobytes()


def test_every_step_is_told(model_folder: Path, lora_folder: Path) -> None:
    pipe = assemble(model_folder, [("cat", 1.0)], folder=lora_folder)
    steps = []
    render(pipe, write_recipe(pipe, WISH), on_step=lambda: steps.append(1))
    assert len(steps) == WISH.steps


def test_a_measured_frequency_is_part_of_the_recipe(
    model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    for name in ("cat", "ink"):
        shutil.copy(lora_folder / f"{name}.safetensors", tmp_path)
    base = base_id(assemble(model_folder, ()).pipe)
    share = Profile("", base, (0.0, 0.5), (0.25, 0.75), (1.0, 1.0))
    card = write_card(tmp_path / "cat.safetensors", share)
    made = recipe(model_folder, tmp_path)
    assert [lora.frequency for lora in made.loras] == [0.5, None]
    assert made.loras[0].window == share.window
    first = render(restore(made, folder=tmp_path), made)
    card.unlink()
    assert render(restore(made, folder=tmp_path), made).image.tobytes() == first.image.tobytes()


def test_another_model_is_not_taken_for_it(
    model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    made = recipe(model_folder, lora_folder)
    other = shutil.copytree(model_folder, tmp_path / "other")
    restore(made, model=other, folder=lora_folder)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    with pytest.raises(CmloraError, match="its hash differs"):
        restore(made, model=other, folder=lora_folder)


def test_a_scheduler_nobody_knows(model_folder: Path, lora_folder: Path) -> None:
    made = recipe(model_folder, lora_folder)
    for name in ("NoSuchScheduler", "UNet2DConditionModel"):
        with pytest.raises(CmloraError, match=f"no scheduler '{name}'"):
            restore(dataclasses.replace(made, scheduler=name), folder=lora_folder)


def test_missing_loras_are_named(model_folder: Path, lora_folder: Path, tmp_path: Path) -> None:
    made = recipe(model_folder, lora_folder)
    disk.save_lora(tmp_path, "ink", strength=0.1)
    with pytest.raises(CmloraError, match=r"cat\.safetensors .*ink\.safetensors .* are not among"):
        restore(made, folder=tmp_path)
    with pytest.raises(CmloraError, match="name its folder"):
        restore(made)


def test_guidance_decides_the_batch_that_is_counted(model_folder: Path, lora_folder: Path) -> None:
    pipe = assemble(model_folder, [("cat", 1.0)], folder=lora_folder)
    guided, free = (
        pass_cost(pipe, write_recipe(pipe, dataclasses.replace(WISH, guidance_scale=g)))
        for g in (4.0, 1.0)
    )
    assert guided is not None
    assert free is not None
    assert guided.full == pytest.approx(2 * free.full, rel=0.01)


def test_small_models_keep_fused_copies_and_others_do_not(
    model_folder: Path, lora_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = assemble(model_folder, [("cat", 1.0)], folder=lora_folder)
    assert native_execution(pipe) == "fused"
    layers = [layer for layer in pipe.pipe.unet.modules() if hasattr(layer, "lora_A")]
    copy = sum(layer.base_layer.weight.numel() * 4 for layer in layers)
    monkeypatch.setattr("cmlora.pipelines.native._COPIES", 2 * copy)
    assert native_execution(pipe) == "fused"
    monkeypatch.setattr("cmlora.pipelines.native._COPIES", 2 * copy - 1)
    assert native_execution(pipe) == "sequential"
    monkeypatch.undo()
    pipe.pipe.unet._hf_hook = "offloaded"
    assert native_execution(pipe) == "sequential"


def test_without_loras_there_is_nothing_to_fuse(model_folder: Path) -> None:
    assert native_execution(assemble(model_folder, ())) == "sequential"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_picture_is_computed_with_its_threads(
    count: int, model_folder: Path, lora_folder: Path
) -> None:
    pipe = assemble(model_folder, [("cat", 1.0)], folder=lora_folder)
    before, seen = torch.get_num_threads(), set()
    recipe = write_recipe(pipe, dataclasses.replace(WISH, threads=count))
    assert Recipe.from_json(recipe.to_json()).threads == count
    assert ("threads" in recipe.to_json()) == bool(count)
    render(pipe, recipe, on_step=lambda: seen.add(torch.get_num_threads()))
    assert seen == {count or before}
    assert torch.get_num_threads() == before


def test_small_models_leave_a_thread_to_others(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = assemble(model_folder, ())
    with threads(3):
        assert native_threads(pipe) == 2
    with threads(1):
        assert native_threads(pipe) == 1
    monkeypatch.setattr("cmlora.pipelines.native._SMALL", 1000)
    assert native_threads(pipe) == 0


def test_a_strength_from_beside_the_file_is_part_of_the_recipe(
    model_folder: Path, tmp_path: Path
) -> None:
    adapted = get_peft_model(
        tiny.sd15().unet, LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"])
    )
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    adapted.save_pretrained(str(tmp_path / "first"))
    file = tmp_path / "first" / "adapter_model.safetensors"
    pipe = assemble(model_folder, [(file, 1.0)])
    made = render(pipe, write_recipe(pipe, WISH))
    (lora,) = made.recipe.loras
    assert lora.config == hashlib.sha256((file.parent / BESIDE).read_bytes()).hexdigest()
    again = Recipe.from_json(made.recipe.to_json())
    assert render(restore(again, folder=file.parent), again).image.tobytes() == made.image.tobytes()

    other = Path(shutil.copytree(file.parent, tmp_path / "other"))
    settings = json.loads((other / BESIDE).read_text())
    (other / BESIDE).write_text(json.dumps({**settings, "lora_alpha": 1}))
    with pytest.raises(
        CmloraError, match=f"its strength comes from .*there sha256 {lora.config[:12]}"
    ):
        render(restore(again, folder=other), again)
    (other / BESIDE).unlink()
    with pytest.warns(UserWarning, match="its strength is not known"):
        moved = restore(again, folder=other)
    with pytest.raises(CmloraError, match="here none"):
        render(moved, again)
    before = dataclasses.replace(again, loras=(dataclasses.replace(lora, config=""),))
    with pytest.raises(CmloraError, match="there none"):
        render(pipe, before)
    assert render(moved, before).recipe == before
