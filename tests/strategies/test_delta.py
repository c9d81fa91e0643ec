"""Delta: one fresh prediction per step, everything else at its last known distance."""

from typing import Any

import pytest
import torch

from cmlora.caching.policy import tally
from cmlora.plan import Member, Plan
from cmlora.strategies import schedule

MEMBERS = [Member("a"), Member("b"), Member("c")]


def carried(plans: tuple[Plan, ...], truth: Any) -> list[torch.Tensor]:
    """What an engine makes of the plans: outputs of ``truth(step, key)``, recalled ones rebuilt."""
    kept: dict[str, torch.Tensor] = {}
    results = []
    for step, plan in enumerate(plans):
        first = plan.passes[0].key
        outputs: dict[str, torch.Tensor] = {}
        for item in plan.passes:
            if item.recall:
                outputs[item.key] = outputs[first] + kept[item.key] - kept[first]
            else:
                outputs[item.key] = truth(step, item.key)
        kept = outputs
        assert not isinstance(plan.combine, tuple)
        results.append(plan.combine(torch.stack([outputs[p.key] for p in plan.passes])))
    return results


def direction(key: str) -> torch.Tensor:
    return torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(len(key) + ord(key[0])))


def fresh(plans: tuple[Plan, ...]) -> list[list[str]]:
    """The passes that are run, step by step."""
    return [[p.key for p in plan.passes if not p.recall] for plan in plans]


def test_the_anchor_is_always_fresh_and_the_others_take_turns() -> None:
    rows = fresh(schedule("delta", MEMBERS, 12, every=3))
    assert rows[0] == ["a+b+c", "base", "a", "b", "c"]
    assert [row[0] for row in rows] == ["a+b+c"] * 12
    assert [row[1:] for row in rows[1:]] == [
        [], [], ["base"], [], [], ["a"], [], [], ["b"], [], [],
    ]  # fmt: skip
    assert sum(tally(schedule("delta", MEMBERS, 12, every=3)).full.values()) == 12 + 4 + 3
    rows = fresh(schedule("delta", MEMBERS, 5, anchor="base", every=1))
    assert rows == [
        ["base", "a", "b", "c"],
        ["base", "a"],
        ["base", "b"],
        ["base", "c"],
        ["base", "a"],
    ]
    rows = fresh(schedule("delta", MEMBERS, 4, rule="composite", every=1))
    assert rows == [["a+b+c", "a", "b", "c"], ["a+b+c", "a"], ["a+b+c", "b"], ["a+b+c", "c"]]


def test_no_difference_grows_older_than_its_limit() -> None:
    plans = schedule("delta", MEMBERS, 20, every=4, oldest=0.25)
    last = dict.fromkeys(["base", "a", "b", "c"], 0)
    for step, row in enumerate(fresh(plans)):
        last.update(dict.fromkeys(row, step))
        assert all(step - at < 5 for at in last.values())


def exactly(rule: str, anchor: str, truth: Any, steps: int) -> list[torch.Tensor]:
    """The result of the rule with every prediction fresh."""
    results = []
    for step in range(steps):
        rows = torch.stack([truth(step, key) for key in ("base", "a", "b", "c")])
        plan = schedule("select", MEMBERS, 1)[0]
        assert not isinstance(plan.combine, tuple)
        results.append(plan.combine(rows) if rule == "select" else rows[1:].mean(0))
    return results


@pytest.mark.parametrize("rule", ["select", "composite"])
@pytest.mark.parametrize("anchor", ["merge", "base"])
def test_differences_that_stay_the_same_cost_nothing(rule: str, anchor: str) -> None:
    """If the predictions move together, the result is that of all fresh ones."""

    def truth(step: int, key: str) -> torch.Tensor:
        return direction(key) + direction(f"{step}?")

    plans = schedule("delta", MEMBERS, 9, rule=rule, anchor=anchor)
    for ours, theirs in zip(carried(plans, truth), exactly(rule, anchor, truth, 9), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_old_difference_is_as_wrong_as_it_has_changed_since() -> None:
    def truth(step: int, key: str) -> torch.Tensor:
        return direction(key) * step

    plans = schedule("delta", MEMBERS, 10, rule="composite", every=1)
    found = carried(plans, truth)
    age = {"a": 2, "b": 1, "c": 0}  # at the last step, c is fresh
    assert fresh(plans)[-1] == ["a+b+c", "c"]
    late = [(direction("a+b+c") - direction(key)) * steps for key, steps in age.items()]
    expected = exactly("composite", "merge", truth, 10)[-1] + torch.stack(late).mean(0)
    torch.testing.assert_close(found[-1], expected, rtol=1e-4, atol=1e-4)


def test_the_anchor_may_be_light() -> None:
    plans = schedule("delta", MEMBERS, 9, "uniform:2")
    assert [plan.passes[0].may_reuse for plan in plans] == [i % 2 == 1 for i in range(9)]
    assert not any(p.may_reuse for plan in plans for p in plan.passes[1:])


def test_a_style_is_kept_in_every_pass() -> None:
    members = [*MEMBERS, Member("ink", category="style")]
    keys = [item.key for item in schedule("delta", members, 1)[0].passes]
    assert keys == ["a+b+c+ink", "ink", "a+ink", "b+ink", "c+ink"]
    keys = [item.key for item in schedule("delta", members, 1, anchor="base")[0].passes]
    assert keys == ["ink", "a+ink", "b+ink", "c+ink"]
