"""Steps go to the LoRA to which they matter most."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmlora.plan import Member
from cmlora.strategies import schedule
from cmlora.strategies.freeswitch import interpolated, winners

EARLY = ((0.0, 9.0), (0.5, 1.0), (1.0, 0.0))
LATE = ((0.0, 0.0), (0.5, 0.1), (1.0, 0.9))


def turns(*members: Member, count: int = 12) -> list[str]:
    return [plan.passes[0].key for plan in schedule("freeswitch", members, count)]


def test_steps_follow_importance_and_not_size() -> None:
    found = turns(Member("a", importance=LATE), Member("b", importance=EARLY))
    assert found[0] == "b"
    assert found[-1] == "a"
    assert found == sorted(found, reverse=True)
    louder = tuple((x, 100 * y) for x, y in LATE)
    assert turns(Member("a", importance=louder), Member("b", importance=EARLY)) == found


def test_nobody_goes_without() -> None:
    flat = ((0.0, 1.0), (1.0, 1.0))
    found = Counter(
        turns(Member("a", importance=EARLY), Member("b", importance=LATE), Member("c"), count=24)
    )
    assert min(found.values()) >= 4
    assert turns(Member("a", importance=flat), Member("b", importance=flat)).count("b") >= 3


def test_without_profiles_they_take_turns() -> None:
    members = [Member("a"), Member("b")]
    assert turns(*members) == [p.passes[0].key for p in schedule("switch", members, 12)]


def test_a_turn_begins_in_full_and_goes_on_light() -> None:
    members = [Member("a", importance=LATE), Member("b", importance=EARLY)]
    plans = schedule("freeswitch", members, 12, "uniform:6")
    keys = [plan.passes[0].key for plan in plans]
    for index in range(1, 12):
        expected = keys[index] == keys[index - 1] and index != 6
        assert plans[index].passes[0].may_reuse == expected


def test_curves_are_linear_between_their_points() -> None:
    curve = ((0.25, 1.0), (0.75, 3.0))
    assert [interpolated(curve, x) for x in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1, 1, 2, 3, 3]
    assert interpolated(((0.5, 2.0),), 0.9) == 2.0


curves = st.lists(st.floats(0, 5), min_size=0, max_size=5).map(
    lambda ys: tuple((i / max(len(ys), 1), y) for i, y in enumerate(ys))
)


@given(st.lists(curves, min_size=1, max_size=4), st.integers(1, 30), st.floats(0, 1))
def test_everybody_has_the_least_part(curves: list[object], count: int, least: float) -> None:
    found = Counter(winners(tuple(curves), count, least))
    assert found.total() == count
    quota = int(least * count / len(curves))
    assert all(found[j] >= quota for j in range(len(curves)))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_users_order_makes_no_difference(order: tuple[int, int]) -> None:
    members = [Member("a", importance=LATE), Member("b", importance=EARLY)]
    assert turns(*[members[i] for i in order]) == turns(*members)
