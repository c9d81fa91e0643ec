"""The published schedule against its own loops, defects included."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlora.caching.policy import nonuniform, parse, tally
from cmlora.errors import CmloraError
from cmlora.frequency.spectrum import intensity
from cmlora.plan import Member, Plan, Step
from cmlora.strategies import METHODS, schedule
from tests import references
from tests.references import Happened

KINDS = ("character", "clothing", "style", "background", "object")
FIVE = [Member(f"{kind}_1") for kind in KINDS]
HIGH = [member.name for member in FIVE if "background" not in member.name]
POLICIES = {0: "nonuniform", 1: "uniform:1", 2: "uniform:2", 3: "uniform:3", 5: "uniform:5"}

intervals = pytest.mark.parametrize("interval", POLICIES)


def happened(plan: Plan) -> Happened:
    assert isinstance(plan.combine, tuple)
    share, name = max(zip(plan.combine, (item.key for item in plan.passes), strict=True))
    assert plan.combine.count(share) == 1
    return Happened(name, {item.key for item in plan.passes if not item.may_reuse})


def published(
    members: list[Member], count: int, interval: int, partition: str = "offline"
) -> list[Happened]:
    plans = schedule(
        "cmlora", members, count, POLICIES[interval], mode="released", partition=partition
    )
    return [happened(plan) for plan in plans]


@intervals
@pytest.mark.parametrize("count", [50, 100, 200, 220])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_offline_is_the_published_loop(n: int, count: int, interval: int) -> None:
    members = FIVE[:n]
    high = [member.name for member in members if member.name in HIGH]
    low = [member.name for member in members if member.name not in HIGH]
    assert published(members, count, interval) == references.published_offline(
        count, high, low, interval
    )


@intervals
@pytest.mark.parametrize("count", [50, 100, 200, 220])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_async_is_the_published_loop(n: int, count: int, interval: int) -> None:
    members = FIVE[:n]
    names = [member.name for member in members]
    assert published(members, count, interval, "async") == references.published_async(
        count, names, interval
    )


MEASURES = (math.nan, 0.1, 0.39, 0.41, 0.9)


@pytest.fixture(scope="module")
def latents() -> dict[float, torch.Tensor]:
    """A latent (1, 4, H, W) of each published m: wide enough for bin 80, or not at all."""
    # bin 80 of 96 x 128 is one sample, the corner: a constant plus an alternating pattern
    y, x = torch.arange(96)[:, None], torch.arange(128)[None, :]
    checkers = 1 - 2.0 * ((y + x) % 2)
    made = {m: (1 + m * checkers).expand(1, 4, 96, 128) for m in MEASURES}
    made[math.nan] = torch.ones(1, 4, 64, 64)
    for m, latent in made.items():
        found = float(intensity(latent[0].mean(0), first_bin=80))
        assert found == pytest.approx(m, nan_ok=True)
    return made


@intervals
@settings(deadline=None, max_examples=10)
@given(measures=st.lists(st.sampled_from(MEASURES), min_size=30, max_size=30))
def test_online_is_the_published_loop(
    latents: dict[float, torch.Tensor], interval: int, measures: list[float]
) -> None:
    expected = references.published_online(30, HIGH, ["background_1"], interval, measures)
    strategy, policy = METHODS["cmlora"].object, parse(POLICIES[interval])
    for index in range(30):
        step = Step(index, 30, sample=latents[measures[index - 1] if index else 0.1])
        plan = strategy(step, FIVE, policy, mode="released", partition="online")
        assert happened(plan) == expected[index]


def test_the_background_is_dominant_in_19_of_79_late_steps() -> None:
    late = published(FIVE, 200, 0)[121:]
    assert len(late) == 79
    assert sum(step.dominant == "background_1" for step in late) == 19
    assert not any(step.dominant == "character_1" for step in late)


def test_character_then_background() -> None:
    trace = published([FIVE[0], FIVE[3]], 200, 0)
    expected = ["character_1"] * 121 + ["background_1"] * 79
    assert [step.dominant for step in trace] == expected


def test_a_run_of_a_hundred_steps_has_no_late_phase() -> None:
    assert not any(step.dominant == "background_1" for step in published(FIVE, 100, 0))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_the_nonuniform_rule_reuses_nothing_and_costs_as_much_as_composite(n: int) -> None:
    for partition in ("offline", "online", "async"):
        plans = schedule(
            "cmlora", FIVE[:n], 200, "nonuniform", mode="released", partition=partition
        )
        assert tally(plans).light == {}
        assert sum(tally(plans).full.values()) == n * 200


def test_a_uniform_rule_renews_nothing_late() -> None:
    trace = published(FIVE, 200, 3)
    assert all(step.full for index, step in enumerate(trace[:121]) if index % 3 == 0)
    assert not any(step.full for step in trace[121:])


@pytest.mark.parametrize(
    ("n", "dominant", "other"),
    [(2, 0.600, 0.400), (3, 0.556, 0.222), (4, 0.538, 0.154), (5, 0.529, 0.118)],
)
@pytest.mark.parametrize("partition", ["offline", "online", "async"])
def test_the_shares_of_the_first_step_last(
    n: int, dominant: float, other: float, partition: str
) -> None:
    for plan in schedule(
        "cmlora", FIVE[:n], 200, "nonuniform", mode="released", partition=partition
    ):
        assert isinstance(plan.combine, tuple)
        assert sorted(plan.combine)[-1] == pytest.approx(dominant, abs=0.0006)
        assert sorted(plan.combine)[:-1] == pytest.approx([other] * (n - 1), abs=0.0006)


def test_async_begins_with_the_last_lora_and_renews_the_next_one() -> None:
    trace = published(FIVE, 200, 2, "async")
    assert {step.dominant for step in trace[:20]} == {"object_1"}
    assert {step.dominant for step in trace[20:40]} == {"character_1"}
    assert all(step.full == {"character_1"} for step in trace[2:20:2])


def test_dominant_and_renewed_meet_at_four_switches_of_the_nonuniform_rule() -> None:
    # a policy with the same refresh steps that does reuse
    steps = "steps:" + ",".join(map(str, nonuniform().refreshes(200)))
    plans = schedule("cmlora", FIVE, 200, steps, mode="released", partition="async")
    met = [
        index
        for index, step in enumerate(map(happened, plans))
        if index > 0 and step.full == {step.dominant}
    ]
    assert met == [20, 40, 60, 120]


def test_online_on_small_latents_is_late_from_the_second_step() -> None:
    late = references.published_online(200, HIGH, ["background_1"], 0, [math.nan] * 200)
    assert published(FIVE, 200, 0, "online") == late
    assert late[0].dominant == "character_1"
    assert late[1].dominant == "clothing_1"
    assert not any(step.dominant == "character_1" for step in late[1:])


def test_classes_come_from_roles_categories_and_ids() -> None:
    by_id = published([Member("character_2"), Member("background_1")], 200, 0)
    by_category = published(
        [Member("character_2", category="style"), Member("background_1", category="background")],
        200,
        0,
    )
    by_role = published(
        [Member("character_2", role="high"), Member("background_1", role="low")], 200, 0
    )
    assert by_id == by_category == by_role


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([FIVE[0], Member("my_lora")], "'my_lora' has none"),
        ([FIVE[3]], "low-frequency LoRAs alone"),
    ],
)
def test_what_the_published_code_cannot_place_is_an_error(
    members: list[Member], message: str
) -> None:
    with pytest.raises(CmloraError, match=message):
        published(members, 20, 0)


@pytest.mark.parametrize(
    "options", [{"late": 0.5}, {"order": "low_first"}, {"max_age": None}, {"dominance": 1.0}]
)
def test_its_rules_cannot_be_changed(options: dict[str, Any]) -> None:
    with pytest.raises(CmloraError, match="its rules are fixed"):
        schedule("cmlora", FIVE, 20, mode="released", **options)
