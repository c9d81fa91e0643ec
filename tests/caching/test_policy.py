"""Refresh steps, the texts that stand for policies, and how runs are counted."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlora.caching.policy import (
    POLICIES,
    NonUniform,
    custom,
    none,
    nonuniform,
    parse,
    tally,
    uniform,
)
from cmlora.errors import CmloraError
from cmlora.plan import Pass, Plan, Policy
from tests.references import nonuniform_refreshes

counts = st.integers(1, 300)
fractions = st.floats(0, 1)
policies = st.one_of(
    st.builds(none),
    st.builds(uniform, st.integers(1, 20)),
    st.builds(
        lambda c1, c2, edges: nonuniform(c1, c2, min(edges), max(edges)),
        st.integers(1, 6),
        st.integers(1, 6),
        st.tuples(fractions, fractions),
    ),
    st.builds(custom, st.lists(st.integers(0, 300))),
)


@pytest.mark.parametrize(("count", "refreshes"), [(100, 43), (200, 85), (220, 92)])
def test_nonuniform_has_the_published_number_of_refreshes(count: int, refreshes: int) -> None:
    assert len(nonuniform().refreshes(count)) == refreshes


@settings(deadline=None)
@given(counts, st.integers(1, 6), st.integers(1, 6))
def test_nonuniform_matches_the_loop(count: int, c1: int, c2: int) -> None:
    expected = nonuniform_refreshes(count, c1, c2)
    assert list(nonuniform(c1, c2).refreshes(count)) == expected


def test_nonuniform_changes_pace_at_its_edges() -> None:
    # T = 16: middle part from 6 to 14
    assert nonuniform().refreshes(16) == (0, 2, 4, 6, 9, 12, 14)


def test_an_edge_that_rounds_down_by_a_float_error_is_kept() -> None:
    assert 29 in nonuniform(7, 5, 0.29, 0.9).refreshes(100)


@settings(deadline=None)
@given(policies, counts)
def test_refreshes_ascend_from_zero_within_the_run(policy: Policy, count: int) -> None:
    steps = policy.refreshes(count)
    assert steps[0] == 0
    assert steps[-1] < count
    assert all(a < b for a, b in itertools.pairwise(steps))


@settings(deadline=None)
@given(policies, counts)
def test_without_reuse_every_step_is_a_refresh(policy: Policy, count: int) -> None:
    if not policy.reuse:
        assert policy.refreshes(count) == tuple(range(count))


@settings(deadline=None)
@given(policies)
def test_the_name_stands_for_the_policy(policy: Policy) -> None:
    assert parse(policy.name) == policy
    assert parse(policy) is policy


@pytest.mark.parametrize("policy", [none(), uniform(1), nonuniform(1, 1)])
def test_interval_one_reuses_nothing(policy: Policy) -> None:
    assert not policy.reuse
    assert policy.refreshes(7) == tuple(range(7))


def test_texts() -> None:
    assert parse("uniform:3") == uniform(3)
    assert parse("nonuniform") == NonUniform()
    assert parse("nonuniform:2,4,0.25,0.5") == nonuniform(2, 4, 0.25, 0.5)
    assert parse("steps:9,0,5").refreshes(8) == (0, 5)
    assert parse(" none ") == none()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform:0", "interval 0"),
        ("uniform:1.5", "interval 1.5"),
        ("uniform", "uniform:3"),
        ("uniform:", "uniform:3"),
        ("uniform:2,3", "uniform:3"),
        ("uniform:x", "uniform:3"),
        ("unifrom:3", "did you mean uniform"),
        ("nonuniform:2,3,0.9,0.1", "0 <= start <= end <= 1"),
        ("nonuniform:2,3,nan,0.5", "0 <= start <= end <= 1"),
        ("steps:-1", "counted from 0"),
        ("steps:1.5", "counted from 0"),
        ("steps:", "steps:0,5,9"),
        ("none:1", "write none"),
        ("", "unknown cache policy"),
    ],
)
def test_a_wrong_text_is_one_helpful_line(text: str, message: str) -> None:
    with pytest.raises(CmloraError, match="cache policy") as caught:
        parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_policy_is_listed() -> None:
    assert list(POLICIES) == ["none", "uniform", "nonuniform", "steps", "threshold"]


def test_the_first_run_of_a_slot_is_full_even_if_it_may_reuse() -> None:
    one, other = Pass({"a": 1.0}, may_reuse=True), Pass({"b": 1.0}, may_reuse=True)
    fresh = Pass({"a": 1.0})
    plans = [Plan((one,)), Plan((one,)), Plan((other,)), Plan((other,)), Plan((fresh,))]
    counted = tally(plans)
    assert counted.full == {"a": 2, "b": 1}
    assert counted.light == {"a": 1, "b": 1}


def test_the_first_run_after_a_pause_is_full() -> None:
    one, other = Pass({"a": 1.0}, may_reuse=True), Pass({"b": 1.0}, may_reuse=True)
    both = Plan((one, other), (0.5, 0.5))
    counted = tally([both, both, Plan((one,)), both, both])
    assert counted.full == {"a": 1, "b": 2}
    assert counted.light == {"a": 4, "b": 2}


def test_a_half_has_a_slot_of_its_own() -> None:
    half, whole = Pass({"a": 1.0}, True, branch="cond"), Pass({"a": 1.0}, True)
    counted = tally([Plan((half,)), Plan((half,)), Plan((whole,)), Plan((whole,))])
    assert counted.full == {"a": 1.5}
    assert counted.light == {"a": 1.5}


@pytest.mark.parametrize("value", [5, ["none"], {"threshold": 0.1}])
def test_what_is_no_policy_is_named(value: Any) -> None:
    with pytest.raises(CmloraError, match="expected a text such as uniform:3, a policy"):
        parse(value)
