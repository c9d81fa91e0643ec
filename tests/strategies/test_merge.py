"""Merge: everything in one pass."""

from cmlora.plan import Member, Pass
from cmlora.strategies import schedule


def test_all_loras_are_active_at_their_weights_in_one_pass() -> None:
    members = [Member("b", 0.5), Member("a", 0.8), Member("c", -1.0)]
    for plan in schedule("merge", members, 10):
        assert plan.passes == (Pass({"a": 0.8, "b": 0.5, "c": -1.0}),)
        assert list(plan.passes[0].weights) == ["a", "b", "c"]
        assert plan.combine == (1.0,)


def test_the_general_rule_of_reuse() -> None:
    plans = schedule("merge", [Member("a"), Member("b")], 7, "uniform:3")
    assert [plan.passes[0].may_reuse for plan in plans] == [
        False, True, True, False, True, True, False,
    ]  # fmt: skip
