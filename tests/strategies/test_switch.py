"""Switch: whose turn it is."""

from hypothesis import given, settings
from hypothesis import strategies as st

from cmlora.caching.policy import tally
from cmlora.plan import Member
from cmlora.strategies import schedule

FIVE = [Member(name) for name in ("character", "clothing", "style", "background", "object")]


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 80))
def test_the_turns_follow_the_papers_formula(tau: int, n: int, count: int) -> None:
    members = FIVE[:n]
    for t, plan in enumerate(schedule("switch", members, count, tau=tau), start=1):
        i = ((t - 1) % (n * tau)) // tau + 1
        assert plan.passes[0].key == members[i - 1].name


def test_five_steps_a_turn_in_the_users_order() -> None:
    names = [plan.passes[0].key for plan in schedule("switch", FIVE[:2], 12)]
    assert names == ["character"] * 5 + ["clothing"] * 5 + ["character"] * 2


def test_a_turn_begins_with_a_fresh_feature() -> None:
    plans = schedule("switch", FIVE[:2], 12, "steps:0", tau=4)
    assert [plan.passes[0].may_reuse for plan in plans] == [
        False, True, True, True, False, True, True, True, False, True, True, True,
    ]  # fmt: skip
    assert tally(plans).full == {"character": 2, "clothing": 1}
