"""Curves: what they are at the beginning of every step."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmlora.errors import CmloraError
from cmlora.plan import Step
from cmlora.schedules.curve import Curve, constant, window

EASES = ("linear", "hold", "smooth", "in", "out")


@pytest.mark.parametrize(
    ("ease", "halfway"),
    [("linear", 0.5), ("hold", 0.0), ("smooth", 0.5), ("in", 0.25), ("out", 0.75)],
)
def test_halfway_between_two_points(ease: Any, halfway: float) -> None:
    curve = Curve(((0.0, 0.0), (0.5, 1.0)), ease)
    assert curve.value(0.25) == halfway
    assert curve.value(0.5) == curve.value(0.9) == 1.0


def test_a_smooth_curve_is_slow_at_both_ends() -> None:
    curve = Curve(((0.0, 0.0), (1.0, 1.0)), "smooth")
    assert curve.value(0.25) == pytest.approx(3 / 16 - 2 / 64)
    assert curve.value(0.1) < 0.1
    assert curve.value(0.9) > 0.9


def test_before_the_first_point_the_curve_has_its_value() -> None:
    curve = Curve(((0.5, 0.25), (1.0, 1.0)))
    assert curve.value(0.0) == 0.25


def test_a_curve_jumps_where_a_place_has_two_points() -> None:
    curve = Curve(((0.0, 1.0), (0.5, 1.0), (0.5, 0.0), (1.0, 0.5)))
    assert curve.value(0.499) == 1.0
    assert curve.value(0.5) == 0.0
    assert curve.value(0.75) == 0.25


def test_a_step_has_the_value_of_its_beginning() -> None:
    """The first half of eight steps is steps 0 to 3: no step too early, none too late."""
    half = window(0.0, 0.5)
    assert [half.at(Step(i, 8)) for i in range(8)] == [1.0] * 4 + [0.0] * 4
    from_two_on = window(2, 5, over="step")
    assert [from_two_on.at(Step(i, 8)) for i in range(8)] == [0, 0, 1, 1, 1, 0, 0, 0]


def test_noise_levels_fall_in_the_course_of_a_run() -> None:
    curve = window(0.3, 0.8, over="sigma")
    levels = (1.0, 0.8, 0.5, 0.3, 0.1)
    values = [curve.at(Step(i, 5, sigma=sigma)) for i, sigma in enumerate(levels)]
    assert values == [0.0, 0.0, 1.0, 1.0, 0.0]
    with pytest.raises(CmloraError, match="not known"):
        curve.at(Step(0, 5))


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        ((), {}, "at least one point"),
        (((0.5, 1.0), (0.2, 0.0)), {}, "ascending"),
        (((0.0, math.nan),), {}, "not finite"),
        (((0.0, math.inf),), {}, "not finite"),
        (((2.0, 1.0),), {}, "0 to 1"),
        (((-1.0, 1.0),), {"over": "sigma"}, "0 to any number"),
        (((0.0, 1.0),), {"ease": "bouncy"}, "linear, hold"),
        (((0.0, 1.0),), {"over": "time"}, "fraction, step, sigma"),
    ],
)
def test_an_impossible_curve_says_why(points: Any, options: Any, message: str) -> None:
    with pytest.raises(CmloraError, match=message):
        Curve(points, **options)


numbers = st.floats(-3, 3, allow_nan=False)
places = st.lists(st.floats(0, 1), min_size=1, max_size=6).map(sorted)


@given(places, st.data(), st.sampled_from(EASES), st.floats(0, 1))
def test_a_curve_stays_between_its_points(
    at: list[float], data: st.DataObject, ease: Any, place: float
) -> None:
    values = data.draw(st.lists(numbers, min_size=len(at), max_size=len(at)))
    curve = Curve(tuple(zip(at, values, strict=True)), ease)
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert min(values) - slack <= curve.value(place) <= max(values) + slack


@given(numbers, st.floats(0, 1))
def test_a_constant_is_the_same_everywhere(value: float, place: float) -> None:
    assert constant(value).constant
    assert constant(value).value(place) == value
