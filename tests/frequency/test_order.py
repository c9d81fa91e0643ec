"""Classes and orders from labels, measurements and nothing at all."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlora.frequency.order import order, partition, phases, single_phase, threshold
from cmlora.plan import Member

SET = (
    Member("nezuko", frequency=0.80),
    Member("uniform", frequency=0.78),
    Member("ink", frequency=0.85),
    Member("bamboo", frequency=0.30),
    Member("toast", frequency=0.82),
)

shares = st.lists(st.floats(0, 1), min_size=2, max_size=7)


def test_measurements_single_out_the_background() -> None:
    assert partition(SET) == (("ink", "toast", "nezuko", "uniform"), ("bamboo",))


@settings(deadline=None)
@given(st.permutations(SET))
def test_a_measured_order_does_not_depend_on_the_order_given(members: list[Member]) -> None:
    assert partition(members) == partition(SET)
    for how in ("measured", "high_first", "low_first"):
        assert order(members, how) == order(SET, how)


def test_high_first_and_low_first_are_reverses() -> None:
    assert order(SET, "low_first") == list(reversed(order(SET, "high_first")))
    assert phases(SET, "high_first")[1] == ("bamboo",)
    assert phases(SET, "low_first")[0] == ("bamboo",)


def test_a_role_wins_over_the_measurement() -> None:
    members = (Member("a", frequency=0.9, role="low"), Member("b", frequency=0.1, role="high"))
    assert partition(members) == (("b",), ("a",))


def test_a_measurement_wins_over_the_category() -> None:
    members = (
        Member("a", frequency=0.9, category="background"),
        Member("b", frequency=0.1, category="character"),
    )
    assert partition(members) == (("a",), ("b",))


def test_categories_stand_in_where_nothing_was_measured() -> None:
    members = tuple(Member(c, category=c) for c in ("background", "style", "character"))
    assert partition(members) == (("style", "character"), ("background",))


def test_labelling_one_member_low_makes_the_others_high() -> None:
    members = (Member("b"), Member("forest", role="low"), Member("a"))
    assert partition(members) == (("b", "a"), ("forest",))
    assert phases(members) == (("b", "a"), ("forest",))


@pytest.mark.parametrize(
    "members",
    [
        (Member("b"), Member("a")),
        (Member("b", frequency=0.5), Member("a", frequency=0.5)),
        (Member("b", frequency=0.5), Member("a", frequency=0.505)),
        (Member("b", role="low"), Member("a", role="low")),
        (Member("b", frequency=0.5), Member("a", frequency=math.nan)),
        (
            Member("b", frequency=0.5, category="background"),
            Member("a", frequency=0.5, category="style"),
        ),
        (Member("a"),),
    ],
)
def test_without_a_difference_there_is_a_single_phase(members: tuple[Member, ...]) -> None:
    early, late = phases(members)
    assert single_phase(early, late)
    assert sorted(early) == sorted(member.name for member in members)


def test_equal_frequencies_are_ordered_by_name() -> None:
    members = (Member("b", frequency=0.5), Member("a", frequency=0.5), Member("c", frequency=0.51))
    assert order(members) == ["c", "a", "b"]


def test_an_unmeasured_set_keeps_the_users_order() -> None:
    assert order((Member("b"), Member("a"))) == ["b", "a"]


def test_the_measured_order_puts_the_class_first_that_acts_first() -> None:
    late_window, early_window = (0.5, 0.9), (0.1, 0.4)
    coarse_to_fine = (
        Member("fine", frequency=0.9, window=late_window),
        Member("coarse", frequency=0.1, window=early_window),
    )
    assert order(coarse_to_fine, "measured") == ["coarse", "fine"]
    assert order(coarse_to_fine, "high_first") == ["fine", "coarse"]
    as_in_the_paper = (
        Member("fine", frequency=0.9, window=early_window),
        Member("coarse", frequency=0.1, window=late_window),
    )
    assert order(as_in_the_paper, "measured") == ["fine", "coarse"]


@settings(deadline=None)
@given(shares)
def test_the_threshold_is_the_best_two_means_split(values: list[float]) -> None:
    def cost(group: list[float]) -> float:
        mean = sum(group) / len(group)
        return sum((value - mean) ** 2 for value in group)

    found = threshold(values)
    if found is None:
        assert max(values) - min(values) < 0.02
        return
    low = [value for value in values if value <= found]
    high = [value for value in values if value > found]
    assert low
    assert high
    # any assignment at all, not only cuts of the sorted list
    best = min(
        cost([v for v, side in zip(values, sides, strict=True) if side])
        + cost([v for v, side in zip(values, sides, strict=True) if not side])
        for sides in itertools.product([False, True], repeat=len(values))
        if any(sides) and not all(sides)
    )
    assert cost(low) + cost(high) == pytest.approx(best, abs=1e-12)


def test_of_two_equal_splits_the_one_with_fewer_low_members() -> None:
    assert threshold([0.0, 0.5, 1.0]) == 0.25
