"""Schedules, shared branches and chosen methods, from a wish through a recipe to a picture."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmlora.errors import CmloraError
from cmlora.frequency.card import Profile, write_card
from cmlora.frequency.profile import base_id
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.pipelines.overlap import overlap
from cmlora.pipelines.render import Wish, assemble, render, restore, settled, write_recipe
from cmlora.recipe import Recipe

WISH = Wish("a cat", steps=4, seed=3)


def loaded(model: Path, loras: Path) -> CMLoRAPipeline:
    return assemble(model, [("cat", 1.0), ("hat", 0.8), ("ink", 0.7)], folder=loras)


def wish(**changes: Any) -> Wish:
    return dataclasses.replace(WISH, **changes)


def test_a_schedule_is_part_of_the_recipe(model_folder: Path, lora_folder: Path) -> None:
    pipe = loaded(model_folder, lora_folder)
    text = "<lora:cat:0@0,1@0.5> [<lora:ink:0.5>::0.5]"
    made = write_recipe(pipe, wish(method="merge", schedule=text, uncond="shared"))
    assert made.uncond == "shared"
    first = render(pipe, made)
    again = Recipe.from_json(made.to_json())
    assert again == made
    assert render(restore(again, folder=lora_folder), again).image.tobytes() == (
        first.image.tobytes()
    )
    plain = render(pipe, write_recipe(pipe, wish(method="merge")))
    assert plain.image.tobytes() != first.image.tobytes()


def test_a_step_in_one_batch_is_part_of_the_recipe(model_folder: Path, lora_folder: Path) -> None:
    pipe = loaded(model_folder, lora_folder)
    made = write_recipe(pipe, wish(method="composite", execution="batched"))
    assert Recipe.from_json(made.to_json()).execution == "batched"
    together = np.asarray(render(pipe, made).image).astype(int)
    alone = np.asarray(render(pipe, dataclasses.replace(made, execution="sequential")).image)
    assert np.abs(together - alone).max() <= 1


def test_a_recipe_without_them_is_what_it_was(model_folder: Path, lora_folder: Path) -> None:
    """Nothing about schedules is written where there is none."""
    made = write_recipe(loaded(model_folder, lora_folder), WISH)
    text = made.to_json()
    for word in ("schedule", "uncond", "execution", "scope", "relevance", "importance"):
        assert f'"{word}":' not in text
    assert Recipe.from_json(text) == made


def test_mistakes_are_told_before_anything_is_drawn(model_folder: Path, lora_folder: Path) -> None:
    pipe = loaded(model_folder, lora_folder)
    with pytest.raises(CmloraError, match="character 11: 'x' is not a number"):
        write_recipe(pipe, wish(schedule="<lora:cat:x>"))
    with pytest.raises(CmloraError, match="no LoRA 'dog' is composed; composed: cat, hat, ink"):
        write_recipe(pipe, wish(schedule="<lora:dog:1>"))
    with pytest.raises(CmloraError, match="uncond is 'both', not one of per_lora, shared"):
        write_recipe(pipe, wish(uncond="both"))
    with pytest.raises(CmloraError, match="execution is 'both', not one of sequential, batched"):
        write_recipe(pipe, wish(execution="both"))


def test_importance_comes_from_the_card_and_stays_with_the_recipe(
    model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    for name in ("cat", "hat", "ink"):
        shutil.copy(lora_folder / f"{name}.safetensors", tmp_path)
    base = base_id(assemble(model_folder, ()).pipe)
    cards = [
        write_card(
            tmp_path / f"{name}.safetensors",
            Profile("", base, (0.0, 0.5), (0.5, 0.5), norms),
        )
        for name, norms in (("cat", (1.0, 0.1)), ("hat", (0.1, 1.0)), ("ink", (0.1, 1.0)))
    ]
    pipe = loaded(model_folder, tmp_path)
    made = write_recipe(pipe, wish(method="freeswitch", cache="none"))
    assert made.loras[0].importance == ((0.0, 0.5), (0.5, 0.05))
    first = render(pipe, made)
    assert first.report.full["cat"] == 2
    for card in cards:
        card.unlink()
    again = Recipe.from_json(made.to_json())
    assert render(restore(again, folder=tmp_path), again).image.tobytes() == first.image.tobytes()


def test_auto_is_settled_before_the_recipe_is_written(
    model_folder: Path, lora_folder: Path
) -> None:
    pipe = loaded(model_folder, lora_folder)
    paths = {name: lora.path for name, lora in pipe.loras.items()}
    sizes, interference = overlap(paths)
    assert set(sizes) == {"cat", "hat", "ink"}
    assert interference is not None
    assert 0 <= interference < 1
    assert overlap({"cat": paths["cat"], "again": paths["cat"]})[1] == pytest.approx(1.0)
    asked = wish(method="auto", options={"budget": "9"}, steps=12)
    found, factors, reason = settled(pipe, asked)
    made = write_recipe(pipe, asked)
    assert made.method == found.method != "auto"
    assert reason.startswith(made.method)
    weights = pipe.ensemble.weights()
    for lora in made.loras:
        assert lora.weight == pytest.approx(weights[lora.name] * factors.get(lora.name, 1.0))
    assert render(pipe, made).report.method == made.method
    assert settled(pipe, WISH) == (WISH, {}, "")
