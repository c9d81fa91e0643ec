"""Known defects of the published code, one test each: paper mode has none of them."""

from typing import Any

import pytest
import torch

from cmlora.caching.policy import nonuniform, tally
from cmlora.errors import CmloraError
from cmlora.frequency.order import partition
from cmlora.plan import Member, Plan, Step
from cmlora.strategies import METHODS, check_options, schedule

SET = [
    Member("character", role="high"),
    Member("clothing", role="high"),
    Member("style", role="high"),
    Member("background", role="low"),
]


def dominants(count: int, members: list[Member] = SET, **options: Any) -> list[str]:
    names = []
    for plan in schedule("cmlora", members, count, "nonuniform", decay=False, **options):
        assert isinstance(plan.combine, tuple)
        names.append(max(zip(plan.combine, plan.passes, strict=True), key=lambda p: p[0])[1].key)
    return names


def full(plan: Plan) -> set[str]:
    return {item.key for item in plan.passes if not item.may_reuse}


def shares(plan: Plan) -> tuple[float, ...]:
    assert isinstance(plan.combine, tuple)
    return plan.combine


@pytest.mark.parametrize("way", ["offline", "online", "async"])
def test_the_nonuniform_policy_does_reuse(way: str) -> None:
    counted = tally(schedule("cmlora", SET, 200, "nonuniform", partition=way))
    assert sum(counted.light.values()) > 5 * sum(counted.full.values())


def test_the_dominant_weight_does_decay() -> None:
    plans = schedule("cmlora", SET, 200, "nonuniform")
    largest = [max(shares(plan)) for plan in plans]
    assert largest == sorted(largest, reverse=True)
    assert largest[-1] < largest[2] < largest[0]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_no_weight_is_negative_or_inverted(n: int) -> None:
    for plan in schedule("cmlora", SET[:n], 200, "nonuniform"):
        assert min(shares(plan)) > 0
        assert max(shares(plan)) >= 1 / n


def test_the_dominant_is_renewed_in_the_late_phase_too() -> None:
    plans = schedule("cmlora", SET, 200, "uniform:3", max_age=None)
    assert all(full(plans[step]) == {"background"} for step in range(123, 200, 3))


def test_the_late_phase_belongs_to_the_low_loras() -> None:
    names = dominants(200)
    assert set(names[:120]) == {"character", "clothing", "style"}
    assert set(names[120:]) == {"background"}
    two = [*SET, Member("scenery", role="low")]
    assert set(dominants(200, two)[120:]) == {"background", "scenery"}


def test_loras_of_unknown_name_take_part() -> None:
    plans = schedule("cmlora", [Member("a9f3"), Member("my_lora")], 30)
    assert all({item.key for item in plan.passes} == {"a9f3", "my_lora"} for plan in plans)


def test_sets_of_backgrounds_alone_work() -> None:
    members = [Member("forest", role="low"), Member("library", role="low")]
    assert partition(members) == ((), ("forest", "library"))
    assert set(dominants(30, members)) == {"forest", "library"}


@pytest.mark.parametrize("count", [20, 50, 100, 200, 220, 1000])
def test_the_phases_scale_with_the_number_of_steps(count: int) -> None:
    first = dominants(count).index("background")
    assert 0.6 * count <= first < 0.6 * count + 3


def test_small_latents_are_measured_and_noise_is_early_at_every_size() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in ((64, 64), (96, 128), (16, 16)):
        latent = torch.randn(1, 4, *size, generator=generator)
        plan = METHODS["cmlora"].object(
            Step(0, 30, 999.0, latent), SET, nonuniform(), partition="online"
        )
        assert plan.observe is not None
        row = plan.observe(latent, latent[None])
        assert row["late"] == 0
        assert row["high"] == pytest.approx(0.94, abs=0.03)


@pytest.mark.parametrize("policy", ["nonuniform", "uniform:3", "uniform:7"])
def test_async_renews_the_dominant_itself(policy: str) -> None:
    plans = schedule("cmlora", SET, 200, policy, partition="async", max_age=None, decay=False)
    previous = ""
    for index, plan in enumerate(plans):
        share = max(shares(plan))
        name = plan.passes[shares(plan).index(share)].key
        if name != previous:
            assert name in full(plan)
        elif index:
            assert full(plan) in (set(), {name})
        previous = name


def test_async_begins_with_the_first_lora_and_scales_its_clock() -> None:
    for count in (50, 200, 400):
        names = dominants(count, partition="async")
        assert names[0] == "character"
        changes = [i for i in range(1, count) if names[i] != names[i - 1]]
        assert changes == [count // 10 * k for k in range(1, 10)]


def test_switch_a_keeps_its_turns_its_last_high_lora_and_switches_late() -> None:
    members = [*SET, Member("scenery", role="low")]
    names = [plan.passes[0].key for plan in schedule("switch_a", members, 200)]
    turns = ("character", "clothing", "style", "character")
    assert names[:20] == [name for name in turns for _ in range(5)]
    assert set(names[120:]) == {"background", "scenery"}
    assert names[120:130] == ["background"] * 5 + ["scenery"] * 5
    pair = [plan.passes[0].key for plan in schedule("switch_a", SET[:2], 20)]
    assert pair == ["character"] * 5 + ["clothing"] * 5 + ["character"] * 5 + ["clothing"] * 5


@pytest.mark.parametrize("method", ["composite", "cmlora", "select"])
def test_the_combination_needs_no_guidance(method: str) -> None:
    """One output per sample goes in and the combination comes out, with or without two halves."""
    plan = schedule(method, SET, 1)[0]
    outputs = torch.randn(len(plan.passes), 2, 4, 8, 8)

    def carried_out(stack: torch.Tensor) -> torch.Tensor:
        if not isinstance(plan.combine, tuple):
            return plan.combine(stack)
        return sum((s * o for s, o in zip(plan.combine, stack, strict=True)), torch.tensor(0.0))

    both = carried_out(outputs)
    for sample in range(2):
        alone = carried_out(outputs[:, sample : sample + 1])
        torch.testing.assert_close(both[sample : sample + 1], alone)


def test_the_start_weight_can_be_set_and_is_checked() -> None:
    assert max(shares(schedule("cmlora", SET, 1, dominance=2.0)[0])) == pytest.approx(2 / 5)
    with pytest.raises(CmloraError, match="dominance"):
        check_options("cmlora", {"dominance": -1})
    with pytest.raises(CmloraError, match="its rules are fixed"):
        schedule("cmlora", SET, 1, mode="released", threshold=0.3)


def test_the_dominant_may_run_in_full_at_every_step() -> None:
    names = dominants(60)
    always = schedule("cmlora", SET, 60, "nonuniform", dominant_full="always")
    refresh = schedule("cmlora", SET, 60, "nonuniform")
    assert all(name in full(plan) for name, plan in zip(names, always, strict=True))
    assert not all(name in full(plan) for name, plan in zip(names, refresh, strict=True))
