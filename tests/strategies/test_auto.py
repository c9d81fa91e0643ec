"""Auto: the choice follows from what is known, and says why."""

import pytest

from cmlora.branches import share_uncond
from cmlora.caching.policy import parse, tally
from cmlora.plan import Member
from cmlora.strategies import METHODS, schedule
from cmlora.strategies.auto import LIGHT, choose

SET = [Member(name) for name in "abcde"]
CURVE = ((0.0, 1.0), (1.0, 0.0))


@pytest.mark.parametrize(
    ("members", "options", "method", "words"),
    [
        (SET[:1], {}, "merge", "single LoRA"),
        (SET, {"interference": 0.01}, "merge", "hardly overlap"),
        (SET, {"interference": 0.5, "budget": 6.0}, "select", "within the budget"),
        (SET, {"budget": 2.1}, "select", "uniform:3"),
        (SET, {"budget": 2.1, "cacheable": False}, "delta", "2 passes per step"),
        (SET, {"budget": 1.5}, "delta", "1.5 passes per step"),
        (SET, {"budget": 1.0}, "switch", "one pass per step"),
        (SET, {"count": 4}, "merge", "nothing to reuse"),
        ([Member(n, importance=CURVE) for n in "ab"], {"count": 4}, "freeswitch", "profiles"),
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
def test_the_budget_is_kept(budget: float, n: int) -> None:
    count = 60
    chosen = choose(SET[:n], count, budget=budget)
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
    assert choose(members, 50).order[-1] != "anna"
    assert choose([Member("b"), Member("a")], 50).order == ("a", "b")
    measured = [Member("b", frequency=0.2), Member("a", frequency=0.8)]
    assert choose(measured, 50).order == ("a", "b")


def test_a_loud_lora_is_toned_down() -> None:
    chosen = choose(SET[:3], 50, sizes={"a": 1.0, "b": 1.0, "c": 10.0})
    assert chosen.weights == {"c": pytest.approx(0.2)}
    assert chosen.reason.endswith("c toned down")


def test_the_strategy_does_what_was_chosen() -> None:
    for budget, method in ((6.0, "select"), (1.5, "delta"), (1.0, "switch")):
        ours = schedule("auto", SET, 20, budget=budget)
        theirs = schedule(method, SET, 20)
        assert [p.passes for p in ours] == [p.passes for p in theirs]
