"""Schedules on methods: who takes part, how strongly, and what other programs are told."""

import itertools
import random
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmlora.caching.policy import none
from cmlora.errors import CmloraError
from cmlora.plan import Member, Pass, Plan, Step, Strength
from cmlora.schedules.apply import scheduled
from cmlora.schedules.curve import Curve, constant, window
from cmlora.schedules.parse import parse_schedule
from cmlora.schedules.schedule import Schedule, Track, product, silent
from cmlora.strategies import METHODS

MEMBERS = (Member("a", 0.5), Member("b", 2.0), Member("c", 1.0))


def plans(method: str, schedule: Schedule, steps: int = 12, **options: Any) -> list[Plan]:
    strategy = scheduled(METHODS[method].object, schedule)
    return [strategy(Step(i, steps), MEMBERS, none(), **options) for i in range(steps)]


def strength_in(strength: Strength, layer: str) -> float:
    """What an engine makes of a strength in one layer."""
    if not isinstance(strength, tuple):
        return strength
    return next((s for pattern, s in strength if re.search(pattern, layer)), 0.0)


def test_a_curve_multiplies_the_weight_at_the_step_about_to_run() -> None:
    found = plans("merge", parse_schedule("<lora:a:0@0,1@0.5><lora:b:0.5>"), steps=4)
    assert [p.passes[0].weights.get("a", 0.0) for p in found] == [0.0, 0.25, 0.5, 0.5]
    assert [p.passes[0].weights["b"] for p in found] == [1.0] * 4
    assert [p.passes[0].weights["c"] for p in found] == [1.0] * 4


@pytest.mark.parametrize("method", ["switch", "switch_a", "composite", "cmlora", "select", "delta"])
def test_a_silent_lora_leaves_its_turns_and_shares_to_the_others(method: str) -> None:
    schedule = Schedule((Track("a", window(0.5, 1.0)), Track("b", window(0.0, 0.5))))
    for index, plan in enumerate(plans(method, schedule)):
        active = {name for item in plan.passes for name in item.weights}
        assert active <= ({"b", "c"} if index < 6 else {"a", "c"})
        if isinstance(plan.combine, tuple):
            assert sum(plan.combine) == pytest.approx(1.0)
            assert all(item.weights for item in plan.passes)
    if method == "composite":
        assert plans(method, schedule)[0].combine == (0.5, 0.5)


def test_without_any_strength_the_base_model_runs_alone() -> None:
    schedule = Schedule(tuple(Track(name, window(0.25, 1.0)) for name in "abc"))
    for method in METHODS:
        options: Any = {"coefficients": (1.0, 2.0, 3.0)} if method == "lorahub" else {}
        first = plans(method, schedule, **options)[0]
        assert first.passes == (Pass({}),)
        assert first.combine == (1.0,)


def test_coefficients_stay_with_their_loras() -> None:
    schedule = Schedule((Track("a", window(0.0, 0.5)),))
    found = plans("lorahub", schedule, coefficients=(1.0, 10.0, 100.0))
    assert found[0].passes[0].weights == {"a": 0.5, "b": 20.0, "c": 100.0}
    assert found[-1].passes[0].weights == {"b": 20.0, "c": 100.0}


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("lorahub", "naive")])
def test_an_even_schedule_changes_nothing(method: str) -> None:
    schedule = Schedule((Track("b", constant(1.0)),))
    strategy = METHODS[method].object
    for index, plan in enumerate(plans(method, schedule)):
        assert plan.passes == strategy(Step(index, 12), MEMBERS, none()).passes


def test_blocks_have_strengths_of_their_own() -> None:
    schedule = parse_schedule("<lora:a:1@0,0@1:blocks=^down><lora:a:0.5:blocks=attn2><lora:b:1>")
    weights = plans("merge", schedule, steps=4)[2].passes[0].weights
    assert strength_in(weights["a"], "down_blocks.0.attn2.to_q") == 0.25
    assert strength_in(weights["a"], "up_blocks.0.attn2.to_q") == 0.25
    assert strength_in(weights["a"], "mid_block.attn1.to_q") == 0.5
    assert weights["b"] == 2.0


patterns = st.sampled_from(["down", "^up", "attn2", "to_q$", "mid|up", ""])
strengths = st.floats(-2, 2) | st.lists(
    st.tuples(patterns, st.floats(-2, 2)), min_size=1, max_size=4
).map(tuple)
LAYERS = ["down.attn1.to_q", "down.attn2.to_k", "up.attn2.to_q", "mid.attn1.to_v", "x.to_q"]


@given(strengths, strengths)
def test_a_product_of_strengths_is_the_product_in_every_layer(one: Any, other: Any) -> None:
    both = product(one, other)
    for layer in LAYERS:
        expected = strength_in(one, layer) * strength_in(other, layer)
        assert strength_in(both, layer) == pytest.approx(expected)
    if silent(one) or silent(other):
        assert silent(both)


def test_unknown_loras_and_doubled_curves_are_named() -> None:
    with pytest.raises(CmloraError, match="no LoRA 'dog' is composed; composed: a, b"):
        Schedule((Track("dog", constant(1.0)),)).check(["a", "b"])
    with pytest.raises(CmloraError, match="a has two curves in blocks 'down'"):
        Schedule((Track("a", constant(1.0), "down"), Track("a", constant(2.0), "down")))
    with pytest.raises(CmloraError, match="no regular expression"):
        Track("a", constant(1.0), "(")


def test_steps_of_all_methods_are_told_the_same_strength() -> None:
    """Whatever the method, a LoRA that runs has the weight its curve has at that step."""
    chance = random.Random(0)
    points = tuple((i / 4, chance.uniform(0.2, 1)) for i in range(5))
    schedule = Schedule((Track("b", Curve(points)),))
    for method in METHODS:
        if method in ("naive", "lorahub", "klora"):
            continue
        for index, plan in enumerate(plans(method, schedule)):
            expected = 2.0 * Curve(points).value(index / 12)
            for item in plan.passes:
                if "b" in item.weights:
                    assert item.weights["b"] == pytest.approx(expected)


def test_passes_of_a_scheduled_plan_stay_apart() -> None:
    schedule = parse_schedule("<lora:a:0@0,1@1><lora:b:1@0,0@0.5>")
    for method in ("composite", "select", "loratorio", "multlfg", "cmlora"):
        for plan in plans(method, schedule):
            keys = [item.key for item in plan.passes]
            assert len(set(keys)) == len(keys)
            assert all(x != y for x, y in itertools.combinations(keys, 2))
