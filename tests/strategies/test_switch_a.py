"""Switch-A: turns within the class that is due."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlora.plan import Member
from cmlora.strategies import schedule

HIGH = [Member("a", role="high"), Member("b", role="high")]
LOW = [Member("x", role="low"), Member("y", role="low")]


def turns(members: list[Member], count: int, **options: Any) -> str:
    return "".join(plan.passes[0].key for plan in schedule("switch_a", members, count, **options))


def test_classes_take_turns_before_and_after_the_edge() -> None:
    assert turns([*LOW, *HIGH], 20, tau=3) == "aaabbbaaabbb" + "xxxyyyxx"
    assert turns([*LOW, *HIGH], 20, tau=3, order="low_first") == "xxxyyyxxxyyy" + "aaabbbaa"
    assert turns([*LOW, *HIGH], 20, tau=3, late=0.25) == "aaabb" + "xxxyyyxxxyyyxxx"


def test_the_late_class_switches_too() -> None:
    late = turns([*HIGH, *LOW], 200)[120:]
    assert set(late) == {"x", "y"}
    assert late.count("x") == late.count("y") == 40


def test_every_high_lora_has_its_turn_even_without_a_late_class() -> None:
    assert set(turns(HIGH, 100)) == {"a", "b"}


def test_two_loras_keep_to_their_turns() -> None:
    assert turns(HIGH, 20) == "aaaaabbbbbaaaaabbbbb"
    assert turns([HIGH[0], LOW[0]], 20) == "a" * 12 + "x" * 8


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 60))
def test_without_classes_it_is_switch(tau: int, count: int) -> None:
    members = [Member("c"), Member("a"), Member("b")]
    ours = schedule("switch_a", members, count, "uniform:2", tau=tau)
    assert ours == schedule("switch", members, count, "uniform:2", tau=tau)


@pytest.mark.parametrize("count", [5, 30, 100, 220])
def test_the_edge_is_a_fraction_of_the_run(count: int) -> None:
    names = turns([HIGH[0], LOW[0]], count)
    assert names.index("x") == -(-count * 6 // 10)


def test_a_turn_begins_with_a_fresh_feature() -> None:
    plans = schedule("switch_a", [HIGH[0], HIGH[1], LOW[0]], 20, "steps:0", tau=4)
    fresh = [index for index, plan in enumerate(plans) if not plan.passes[0].may_reuse]
    assert fresh == [0, 4, 8, 12]
