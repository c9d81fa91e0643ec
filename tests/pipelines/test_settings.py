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
from cmlora.pipelines.render import Wish, assemble, render, restore, settled, write_recipe
from cmlora.recipe import Recipe
from cmlora.strategies.auto import Choice

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
    asked = wish(method="auto", options={"budget": "9"}, steps=12)
    found, chosen = settled(pipe, asked)
    made = write_recipe(pipe, asked)
    assert made.method == found.method != "auto"
    assert chosen.reason.startswith(made.method)
    assert made.order == chosen.order
    weights = pipe.ensemble.weights()
    for lora in made.loras:
        factor = chosen.weights.get(lora.name, 1.0)
        assert lora.weight == pytest.approx(weights[lora.name] * factor)
    assert render(pipe, made).report.method == made.method
    assert settled(pipe, WISH) == (WISH, Choice(WISH.method))


def test_auto_counts_the_loras_that_take_part(model_folder: Path, lora_folder: Path) -> None:
    pipe = assemble(model_folder, [("cat", 1.0), ("hat", 0.0), ("ink", 0.0)], folder=lora_folder)
    found, chosen = settled(pipe, wish(method="auto", steps=4))
    assert (found.method, chosen.order) == ("merge", ("cat", "hat", "ink"))
    made = render(pipe, write_recipe(pipe, wish(method="auto", steps=4)))
    assert made.report.full == {"cat": 4}


def test_the_turns_are_the_ones_that_were_chosen(model_folder: Path, lora_folder: Path) -> None:
    pipe = loaded(model_folder, lora_folder)
    asked = wish(method="auto", options={"budget": "1", "plain": "false"}, steps=12)
    given = pipe.ensemble.members(pipe.ensemble.weights())
    known = [
        dataclasses.replace(m, category="character" if m.name == "ink" else None) for m in given
    ]
    pipe.ensemble.members = lambda weights: tuple(known)  # type: ignore[method-assign]
    made = write_recipe(pipe, asked)
    assert made.method == "switch"
    assert made.order == ("ink", "cat", "hat")
    assert write_recipe(pipe, wish(method="switch")).order == ()


def test_a_scope_goes_with_the_picture(model_folder: Path, lora_folder: Path) -> None:
    names = [("cat", 1.0), ("hat", 0.8), ("ink", 0.7)]
    pipe = assemble(model_folder, names, folder=lora_folder, scopes={"ink": "global"})
    made = write_recipe(pipe, wish(method="select"))
    assert {lora.name: lora.scope for lora in made.loras} == {
        "cat": None,
        "hat": None,
        "ink": "global",
    }
    first = render(pipe, made)
    assert set(first.report.full) >= {"ink", "cat+ink", "hat+ink"}
    again = restore(made, folder=lora_folder)
    assert again.loras["ink"].scope == "global"
    assert render(again, made).image.tobytes() == first.image.tobytes()
    with pytest.raises(CmloraError, match="scope for 'inc': the LoRAs are cat, hat, ink"):
        assemble(model_folder, names, folder=lora_folder, scopes={"inc": "global"})


def test_a_call_of_several_prompts_has_no_single_weight(
    model_folder: Path, lora_folder: Path
) -> None:
    pipe = loaded(model_folder, lora_folder)
    said: dict[str, Any] = {"composition": "w_switch", "num_inference_steps": 1, "seed": 0}
    with pytest.raises(CmloraError, match="w_switch weighs LoRAs by the prompt, and this call has"):
        pipe(["a cat", "a hat"], **said)
    assert len(pipe(["a cat", "a cat"], **said).images) == 2
