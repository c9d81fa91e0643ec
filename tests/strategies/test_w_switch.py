"""W-Switch and W-Composite: turns and shares by what the prompt speaks of."""

import itertools
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmlora.plan import Member
from cmlora.strategies import schedule
from cmlora.strategies._passes import turn_lengths


def turns(members: list[Member], count: int, **options: Any) -> list[str]:
    return [plan.passes[0].key for plan in schedule("w_switch", members, count, **options)]


def test_equal_relevance_is_switch() -> None:
    members = [Member(name, relevance=0.3) for name in "abc"]
    assert turns(members, 40) == [p.passes[0].key for p in schedule("switch", members, 40)]
    unknown = [Member(name) for name in "abc"]
    assert turns(unknown, 40) == turns(members, 40)


def test_turns_are_as_long_as_the_prompt_speaks() -> None:
    members = [Member("a", relevance=0.6), Member("b", relevance=0.2), Member("c", relevance=0.2)]
    assert turns(members, 30)[:15] == ["a"] * 9 + ["b"] * 3 + ["c"] * 3
    assert Counter(turns(members, 300)) == {"a": 180, "b": 60, "c": 60}


def test_the_last_steps_are_the_characters() -> None:
    members = [Member("hat"), Member("anna", category="character")]
    found = turns(members, 60)
    assert found[-5:] == ["anna"] * 5
    assert turns(members, 60, final=0) == turns([Member("hat"), Member("anna")], 60)
    assert turns(members, 20) == [*["hat"] * 5, *["anna"] * 5, *["hat"] * 5, *["anna"] * 5]
    assert turns(members, 6) == ["hat", "hat", "anna", "anna", "anna", "anna"]
    silent = [Member("hat", relevance=0.0), Member("anna", relevance=0.5)]
    assert set(turns(silent, 20)) == {"anna"}


def test_a_turn_begins_in_full() -> None:
    members = [Member("hat"), Member("anna", category="character")]
    plans = schedule("w_switch", members, 60, "uniform:4")
    for before, now in itertools.pairwise(plans):
        if before.passes[0].key != now.passes[0].key:
            assert not now.passes[0].may_reuse


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.integers(0, 60))
def test_turn_lengths_add_up_and_are_near_their_shares(weights: list[float], total: int) -> None:
    lengths = turn_lengths(weights, total)
    assert sum(lengths) == total
    assert min(lengths) >= 0
    whole = math.fsum(weights)
    if whole > 0 and total >= len(weights):
        for length, weight in zip(lengths, weights, strict=True):
            assert (length > 0) == (weight > 0)
            assert abs(length - total * weight / whole) <= len(weights)


def test_shares_are_the_relevances() -> None:
    members = [Member("b", relevance=3.0), Member("a", relevance=1.0), Member("c")]
    plan = schedule("w_composite", members, 1)[0]
    assert [item.key for item in plan.passes] == ["a", "b", "c"]
    assert plan.combine == pytest.approx((1 / 6, 3 / 6, 2 / 6))
    even = schedule("w_composite", [Member(n) for n in "abc"], 1)[0]
    assert even.combine == schedule("composite", [Member(n) for n in "abc"], 1)[0].combine
    silent = schedule("w_composite", [Member("a", relevance=0.0), Member("b", relevance=0.0)], 1)
    assert silent[0].combine == (0.5, 0.5)
