"""Auto: the choice follows from what is known, and says why."""

import pytest

from cmlora.branches import share_uncond
from cmlora.caching.policy import parse, tally
from cmlora.plan import Member
from cmlora.strategies import METHODS, schedule
from cmlora.strategies.auto import LIGHT, choose

SET = [Member(name) for name in "abcde"]
CURVE = ((0.0, 1.0), (1.0, 0.0))
MEASURED = [Member(n, importance=CURVE) for n in "ab"]
OTHERS = {"plain": False}
"""Adapters that are no plain LoRAs, whose layers cannot be shared out."""


@pytest.mark.parametrize(
    ("members", "options", "method", "words"),
    [
        (SET[:1], {}, "merge", "single LoRA"),
        (SET, {"budget": 6.0}, "gate", "one pass per step"),
        (SET, {"count": 4, "budget": 1.0}, "gate", "one pass per step"),
        (SET, {"budget": 6.0, **OTHERS}, "select", "within the budget"),
        (SET, {"budget": 2.1, **OTHERS}, "select", "uniform:3"),
        (SET, {"budget": 2.1, "cacheable": False, **OTHERS}, "delta", "2 passes per step"),
        (SET, {"budget": 1.5, **OTHERS}, "delta", "1.5 passes per step"),
        (SET, {"budget": 1.0, **OTHERS}, "switch", "one pass per step"),
        (SET, {"count": 4, **OTHERS}, "merge", "nothing to reuse"),
        (MEASURED, {"count": 4, **OTHERS}, "freeswitch", "profiles"),
    ],
)
def test_the_choice_and_its_reason(members, options, method, words) -> None:  # type: ignore[no-untyped-def]
    count = options.pop("count", 50)
    chosen = choose(members, count, **options)
    assert chosen.method == method
    assert words in chosen.reason
    assert chosen.reason.startswith(method)
    assert "\n" not in chosen.reason
    assert chosen.method in METHODS
    parse(chosen.cache)


@pytest.mark.parametrize("budget", [1.0, 1.5, 2.0, 3.0, 6.0])
@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("plain", [True, False])
def test_the_budget_is_kept(budget: float, n: int, plain: bool) -> None:
    count = 60
    chosen = choose(SET[:n], count, budget=budget, plain=plain)
    plans = schedule(chosen.method, SET[:n], count, chosen.cache, **chosen.options)
    if chosen.uncond == "shared":
        plans = tuple(map(share_uncond, plans))
    run = tally(plans)
    price = (sum(run.full.values()) + LIGHT * sum(run.light.values())) / count
    assert price <= budget + (n + 1) / count


def test_character_first_and_style_last_unless_profiles_say_otherwise() -> None:
    members = [
        Member("ink", category="style"),
        Member("hill", category="background"),
        Member("anna", category="character"),
    ]
    assert choose(members, 50).order == ("anna", "hill", "ink")
    assert choose([Member("b"), Member("a")], 50).order == ("a", "b")
    measured = [Member("b", frequency=0.2), Member("a", frequency=0.8)]
    assert choose(measured, 50).order == ("a", "b")


def test_a_loud_lora_is_toned_down() -> None:
    chosen = choose(SET[:3], 50, sizes={"a": 1.0, "b": 1.0, "c": 10.0})
    assert chosen.weights == {"c": pytest.approx(0.2)}
    assert chosen.reason.endswith("c toned down")


def test_the_strategy_does_what_was_chosen() -> None:
    for budget, method, plain in (
        (6.0, "gate", True),
        (6.0, "select", False),
        (1.5, "delta", False),
        (1.0, "switch", False),
    ):
        ours = schedule("auto", SET, 20, budget=budget, plain=plain)
        theirs = schedule(method, SET, 20)
        assert [p.passes for p in ours] == [p.passes for p in theirs]
