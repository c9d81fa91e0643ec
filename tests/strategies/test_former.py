"""Recipes written before a default changed still mean the picture they were written for."""

import dataclasses
from pathlib import Path

import pytest

from cmlora.eval.variants import read
from cmlora.pipelines.render import Wish, assemble, render, write_recipe
from cmlora.strategies import METHODS
from cmlora.strategies.former import FORMER
from cmlora.strategies.options import defaults
from cmlora.ui.forms import fields_of


@pytest.mark.parametrize("method", FORMER)
def test_what_is_listed_are_options_whose_default_has_changed(method: str) -> None:
    today = defaults(METHODS[method].object)
    assert all(today[name] != value for name, value in FORMER[method].items())


def test_a_recipe_without_options_keeps_its_picture(model_folder: Path, lora_folder: Path) -> None:
    pipe = assemble(model_folder, [("cat", 1.0), ("hat", 0.8)], folder=lora_folder)
    today = write_recipe(pipe, Wish("a cat", method="gate", steps=2))
    assert dict(today.options) == {"strength": 1.0, "sharpness": 8.0, "common": 0.7}
    old = dataclasses.replace(today, options={})
    named = dataclasses.replace(today, options=dict(FORMER["gate"]))
    pictures = [render(pipe, recipe).image.tobytes() for recipe in (old, named, today)]
    assert pictures[0] == pictures[1] != pictures[2]
    texts = [fields_of(recipe, {"cat": "cat", "hat": "hat"})["options"] for recipe in (old, named)]
    assert texts[0] == texts[1]


def test_runs_tell_pictures_of_both_defaults_apart() -> None:
    plain, former = read(["gate", "gate[strength=1.5,sharpness=4,common=1]"])
    assert plain.options_with({}) == {"strength": 1.0, "sharpness": 8.0, "common": 0.7}
    assert former.options_with({}) == dict(FORMER["gate"])
    assert read(["merge"])[0].options_with({}) == {}
