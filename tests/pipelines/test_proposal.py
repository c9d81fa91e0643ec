"""What the doctor's findings come to as a recipe."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cmlora.adapters.analysis.doctor import examine
from cmlora.adapters.analysis.saturation import Saturation
from cmlora.errors import CmloraError
from cmlora.files import write
from cmlora.frequency.card import Profile
from cmlora.lora import LoRA
from cmlora.pipelines.proposal import Proposal, is_proposal, propose
from cmlora.plan import Member
from cmlora.recipe import Ingredient, Recipe
from cmlora.strategies.auto import choose
from tests.synthetic import lora, orthogonal, scaled

ONE = lora("one", 1)


def proposed(
    folder: Path, loras: Sequence[LoRA], frequency: dict[str, float] | None = None, **known: Any
) -> Proposal:
    paths = {}
    for each in loras:
        paths[each.name] = folder / f"{each.name}.safetensors"
        write(each, paths[each.name])
    given = {"profiles": {}, **known}
    return propose(examine(loras, None, frequency).findings, paths, **given)


def test_a_proposal_is_what_auto_says(tmp_path: Path) -> None:
    other = orthogonal(ONE, "other")
    found = proposed(tmp_path, [scaled(ONE, "one", 9), other])
    assert found.method == choose([Member("a"), Member("b")], 30).method == "gate"
    assert {part.name: part.weight for part in found.loras} == {"one": 0.5, "other": 1.0}
    assert (found.schedule, found.options, found.cache) == ("", {}, "none")
    assert found.reason.startswith("gate: ")
    again = Proposal.from_table(json.loads(json.dumps(found.table())))
    assert again == found
    assert is_proposal(found.table())


@pytest.mark.parametrize("sign", [1, -1])
def test_those_that_do_are_what_auto_says(tmp_path: Path, sign: int) -> None:
    near = replace(ONE, name="near", updates={**ONE.updates})
    updates = {
        m: replace(u, scale=sign * u.scale) if i % 3 else orthogonal(ONE, "x").updates[m]
        for i, (m, u) in enumerate(near.updates.items())
    }
    found = proposed(tmp_path, [ONE, replace(near, updates=updates)])
    expected = choose([Member("a"), Member("b")], 30)
    assert (found.method, found.options) == (expected.method, expected.options)
    assert found.method in examine([ONE, replace(near, updates=updates)]).advice[-1].do


def test_copies_and_silent_loras_are_left_out(tmp_path: Path) -> None:
    other = orthogonal(ONE, "other")
    found = proposed(tmp_path, [ONE, scaled(ONE, "twin", 1), scaled(ONE, "off", 0), other])
    assert [part.name for part in found.loras] == ["one", "other"]
    assert sorted(found.order) == ["one", "other"]


def test_measured_frequencies_and_categories_order_them(tmp_path: Path) -> None:
    other = orthogonal(ONE, "other")
    high = Profile("", "", (0.0, 0.5), (0.6, 0.6), (1.0, 1.0))
    low = replace(high, ratio=(0.2, 0.2))
    known = {"profiles": {"one": low, "other": high}}
    found = proposed(tmp_path, [ONE, other], {"one": 0.2, "other": 0.6}, **known)
    assert found.order == ("other", "one")
    back = replace(ONE, metadata={"cmlora.category": "background"})
    assert proposed(tmp_path, [back, other]).order == ("other", "one")


def test_rivals_that_collide_take_turns(tmp_path: Path) -> None:
    alike = {
        m: u if i else orthogonal(ONE, "x").updates[m]
        for i, (m, u) in enumerate(ONE.updates.items())
    }
    pair = [
        replace(x, metadata={"cmlora.category": "character"})
        for x in (ONE, replace(ONE, name="two", updates=alike))
    ]
    found = proposed(tmp_path, pair)
    assert found.schedule == "[<lora:one:1>|<lora:two:1>:0.1]"
    assert "as the recipe does" in examine(pair).advice[-1].do
    apart = [pair[0], replace(pair[1], updates=orthogonal(ONE, "x").updates)]
    assert proposed(tmp_path, apart).schedule == ""
    assert f"--schedule '{found.schedule}'" in examine(apart).advice[-1].do


def test_turns_are_by_name_or_in_the_order_that_is_said() -> None:
    recipe = Recipe("m", "p", 1, 2, 3, 4, loras=(Ingredient("ink"), Ingredient("alice")))
    assert [lora.name for lora in recipe.turns()] == ["alice", "ink"]
    assert "order" not in json.loads(recipe.to_json())
    other = replace(recipe, order=("ink", "alice"))
    assert [lora.name for lora in other.turns()] == ["ink", "alice"]
    assert Recipe.from_json(other.to_json()) == other


def test_measured_limits_are_kept(tmp_path: Path) -> None:
    limits = [Saturation("one", {}, 0.62, "", {})]
    found = proposed(tmp_path, [ONE, orthogonal(ONE, "other")], limits=limits)
    assert {part.name: part.weight for part in found.loras} == {"one": 0.62, "other": 1.0}


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    found = proposed(tmp_path, [ONE, orthogonal(ONE, "other")])
    files = found.files(model="somewhere")
    assert files == [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    moved = tmp_path / "moved" / "there"
    moved.mkdir(parents=True)
    files[1].rename(moved / "renamed.safetensors")
    assert found.files(model="x", folder=tmp_path)[1] == moved / "renamed.safetensors"
    write(scaled(ONE, "one", 2), files[0])
    with pytest.raises(CmloraError, match=r"one\.safetensors .* is not among"):
        found.files(model="x", folder=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cmlora_proposal": 2}, "not between 1 and 1"),
        ({"cmlora_proposal": None}, "not a whole number"),
        ({"loras": {}}, "must be lists"),
        ({"loras": []}, "loras are none"),
        ({"loras": [{"name": "one"}]}, "expected file, name"),
        ({"loras": [3]}, "expected file, name"),
        ({"order": ["one"]}, "order does not name"),
        ({"order": None}, "must be lists"),
        ({"method": "mrege"}, "mrege"),
        ({"method": 3}, "method is 3"),
        ({"options": {"tau": 3}}, "no option"),
        ({"options": []}, "not a table"),
        ({"uncond": "x"}, "uncond is 'x'"),
        ({"schedule": "<lora:three:1>"}, "three"),
        ({"schedule": "<lora"}, "schedule"),
        ({"prompt": "a cat"}, "found"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = proposed(tmp_path, [ONE, orthogonal(ONE, "other")]).table()
    with pytest.raises(CmloraError, match=message):
        Proposal.from_table({**good, **change})
