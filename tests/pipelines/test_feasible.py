"""Recipes that no model can carry out are refused in one line, whoever wrote them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from cmlora.errors import CmloraError
from cmlora.pipelines.feasible import carrying_out, check_size, scheduler_of
from cmlora.pipelines.render import Wish, assemble, render, restore, write_recipe
from cmlora.recipe import Ingredient, Recipe
from tests import tiny

RECIPE = Recipe(model="m", prompt="a cat", seed=1, steps=2, width=32, height=32)


@pytest.fixture
def recipe(model_folder: Path) -> Recipe:
    wish = Wish("a cat", method="naive", cache="none", steps=1, size=(32, 32))
    return write_recipe(assemble(model_folder, ()), wish)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 100}, "recipe: size 100x32: both must be positive multiples of 8"),
        ({"height": 1}, "recipe: size 32x1: both"),
        ({"width": 2**20, "height": 2**20}, "more than 67108864 pixels; make it smaller"),
        ({"scheduler_config": {"beta_start": "x"}}, "DDIMScheduler cannot be made from scheduler"),
        ({"scheduler_config": {"num_train_timesteps": 10**9}}, "num_train_timesteps is 1000000000"),
        ({"scheduler": "AutoencoderKL"}, "no scheduler 'AutoencoderKL'"),
    ],
)
def test_a_recipe_that_cannot_be_drawn(
    recipe: Recipe, changes: dict[str, Any], message: str
) -> None:
    wrong = replace(recipe, **{"scheduler": "DDIMScheduler", **changes})
    with pytest.raises(CmloraError, match=message):
        restore(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 1001}, "DDIMScheduler cannot make 1001 steps"),
        ({"scheduler_config": {"prediction_type": "x"}}, "change the steps or the scheduler"),
    ],
)
def test_what_a_scheduler_notices_later(
    recipe: Recipe, changes: dict[str, Any], message: str
) -> None:
    wrong = replace(recipe, **{"scheduler": "DDIMScheduler", **changes})
    with pytest.raises(CmloraError, match=message):
        render(restore(wrong), wrong)


def test_an_empty_name_is_the_models_own_scheduler() -> None:
    own = tiny.sd15().scheduler
    assert scheduler_of(RECIPE, own) is own
    karras = replace(RECIPE, scheduler="EulerDiscreteScheduler", scheduler_config={"rho": 1})
    assert isinstance(scheduler_of(karras, own), diffusers.EulerDiscreteScheduler)


def test_the_largest_size() -> None:
    pipe = tiny.sd15()
    check_size(pipe, (8192, 8192))
    with pytest.raises(CmloraError, match="size 8200x8192: that is more"):
        check_size(pipe, (8200, 8192))


def test_running_out_of_memory_says_what_to_make_smaller() -> None:
    said = "32x32 pixels; make the picture smaller, or use dtype"
    with pytest.raises(CmloraError, match=said), carrying_out(RECIPE):
        torch.empty(2**50)
    more = replace(RECIPE, loras=(Ingredient("ink"),), execution="batched", dtype="bfloat16")
    said = "1 LoRAs; make the picture smaller, or use fewer LoRAs, or use execution sequential"
    with pytest.raises(CmloraError, match=said), carrying_out(more):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="multiplied"), carrying_out(RECIPE):
        torch.ones(2, 3) @ torch.ones(2, 3)
