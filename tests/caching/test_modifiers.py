"""Additions to cache policies: turns, ages, forecasts; and the threshold policy."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmlora.caching.forecast import forecast
from cmlora.caching.modifiers import MODIFIERS, refresh_steps, renewed
from cmlora.caching.policy import Threshold, parse, threshold
from cmlora.errors import CmloraError
from cmlora.plan import Policy, Step
from tests.references_strategies import accumulated


def full(policy: str | Policy, count: int, slots: int) -> list[list[int]]:
    """Which slots are computed in full, step by step."""
    known = parse(policy)
    rows = [renewed(known, Step(i, count), slots) for i in range(count)]
    return [[slot for slot, now in enumerate(row) if now] for row in rows]


def test_without_additions_a_refresh_renews_everything() -> None:
    assert full("uniform:3", 7, 2) == [[0, 1], [], [], [0, 1], [], [], [0, 1]]
    assert full("none", 3, 2) == [[0, 1]] * 3


def test_in_turn_a_refresh_renews_one_slot() -> None:
    assert full("uniform:2+turns", 9, 3) == [[0, 1, 2], [], [0], [], [1], [], [2], [], [0]]


def test_no_slot_grows_older_than_its_limit() -> None:
    rows = full("uniform:2+turns+age:0.5", 8, 4)
    assert rows == [[0, 1, 2, 3], [], [0], [], [1, 2, 3], [], [0, 2], []]
    last = dict.fromkeys(range(4), 0)
    for step, row in enumerate(rows):
        last.update(dict.fromkeys(row, step))
        assert all(step - at < 4 for at in last.values())
    assert full("steps:0+age:0.25", 9, 1) == [[0], [], [], [0], [], [], [0], [], []]


@pytest.mark.parametrize(
    "text",
    [
        "uniform:2+turns",
        "nonuniform+age:0.2",
        "nonuniform:2,3,0.25,0.5+turns+age:0.3+forecast:2",
        "threshold:0.1",
        "threshold:0.15,0.0,1.0,0.5+forecast:1",
        "steps:0,5,9+turns",
    ],
)
def test_the_name_stands_for_the_policy(text: str) -> None:
    assert parse(parse(text).name) == parse(text)
    assert parse(text).name == text


def test_additions_come_in_any_order_and_say_what_they_are() -> None:
    policy = parse("uniform:2 + forecast + turns")
    assert policy == parse("uniform:2+turns+forecast:1")
    assert getattr(policy, "forecast", 0) == 1
    assert policy.reuse
    assert not parse("uniform:1+turns").reuse
    assert list(MODIFIERS) == ["turns", "age", "forecast"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform:2+turn", "did you mean turns"),
        ("uniform:2+age:2", "write age:0.2"),
        ("uniform:2+age:0", "write age:0.2"),
        ("uniform:2+age:x", "not like"),
        ("uniform:2+forecast:9", "write forecast:1"),
        ("uniform:2+forecast:1.5", "write forecast:1"),
        ("uniform:2+turns:3", "not like"),
        ("uniform:2+turns+turns", "twice"),
        ("threshold:-1", "0 or more"),
        ("threshold:nan", "finite"),
        ("threshold:x", "threshold:0.1"),
    ],
)
def test_a_wrong_text_is_one_helpful_line(text: str, message: str) -> None:
    with pytest.raises(CmloraError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


changes = st.lists(st.floats(0, 1), min_size=0, max_size=30).map(lambda rest: [0.0, *rest])


@given(changes, st.floats(0.01, 2))
def test_the_threshold_is_teacaches_rule(found: Sequence[float], limit: float) -> None:
    policy = Threshold(limit).given(found)
    assert list(policy.refreshes(len(found))) == accumulated(found, limit) or any(
        math.isclose(sum(found[a:b]), limit, rel_tol=1e-9)
        for a in range(len(found))
        for b in range(a + 1, len(found) + 1)
    )


def test_a_threshold_follows_what_the_run_has_shown() -> None:
    policy = threshold(0.5)
    seen = (0.0, 0.2, 0.2, 0.2, 0.0, 0.4, 0.2)
    assert refresh_steps(policy, Step(6, 20, changes=seen)) == (0, 3, 6)
    assert renewed(policy, Step(3, 20, changes=seen[:4]), 2) == (True, True)
    assert renewed(policy, Step(4, 20, changes=seen[:5]), 2) == (False, False)
    turned = parse("threshold:0.5+turns")
    assert renewed(turned, Step(3, 20, changes=seen[:4]), 2) == (True, False)
    assert renewed(turned, Step(6, 20, changes=seen), 2) == (False, True)
    broken = Threshold(0.5).given((0.0, math.nan, 0.0))
    assert broken.refreshes(3) == (0, 1)


def test_coefficients_map_the_changes() -> None:
    doubled = threshold(0.5, 0.0, 2.0).given((0.0, 0.1, 0.1, 0.1))  # type: ignore[attr-defined]
    assert doubled.refreshes(4) == (0, 3)
    assert not threshold(0).reuse
    assert threshold(0).refreshes(3) == (0, 1, 2)


def test_without_measurements_a_cost_can_be_estimated() -> None:
    assert threshold(0.25).refreshes(8) == (0, 2, 4, 6)


@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=4),
    st.lists(st.integers(0, 30), min_size=4, max_size=4, unique=True).map(sorted),
)
def test_a_forecast_continues_a_polynomial(
    coefficients: Sequence[float], steps: Sequence[int]
) -> None:
    """Of degree below the number of values: exact, wherever the values are."""
    order = len(coefficients) - 1

    def truth(step: int) -> torch.Tensor:
        return torch.tensor(
            sum(c * step**i for i, c in enumerate(coefficients)), dtype=torch.float64
        )

    history = [(step, truth(step)) for step in steps[-(order + 1) :]]
    goal = steps[-1] + 2
    size = max(1.0, *(abs(float(value)) for _, value in history)) * 60**order
    assert float(forecast(history, goal, order) - truth(goal)) == pytest.approx(
        0.0, abs=1e-9 * size
    )


def test_order_zero_and_a_short_history_take_what_there_is() -> None:
    first, second = torch.zeros(2), torch.ones(2)
    assert torch.equal(forecast([(0, first), (2, second)], 9, 0), second)
    assert torch.equal(forecast([(2, second)], 9, 2), second)
    assert torch.equal(forecast([(0, first), (2, second)], 3, 2), torch.full((2,), 1.5))
    half = forecast([(0, first.half()), (2, second.half())], 3, 1)
    assert half.dtype == torch.float16
