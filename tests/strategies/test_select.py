"""Select: every location follows the LoRAs that depart from the base there."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from cmlora.caching.policy import none
from cmlora.plan import Member, Plan, Step
from cmlora.strategies import schedule
from cmlora.strategies._selection import prior_logits
from cmlora.strategies.select import select
from tests.references import selected
from tests.references_strategies import selected_with


def plan_for(n: int, **options: Any) -> Plan:
    return schedule("select", [Member(f"lora{i}") for i in range(n)], 1, **options)[0]


def run(plan: Plan, outputs: torch.Tensor) -> torch.Tensor:
    assert not isinstance(plan.combine, tuple)
    return plan.combine(outputs)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("strength", "sharpness"), [(1.5, 4.0), (1.0, 0.0), (2.0, 30.0)])
@pytest.mark.parametrize("n", [2, 4])
def test_it_matches_the_loop_over_locations(n: int, strength: float, sharpness: float) -> None:
    outputs = noise(1 + n, 2, 3, 5, 4)
    ours = run(plan_for(n, strength=strength, sharpness=sharpness), outputs)
    expected = selected(outputs.numpy(), strength, sharpness)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_the_base_comes_first_and_every_lora_has_a_pass() -> None:
    assert [item.key for item in plan_for(3).passes] == ["base", "lora0", "lora1", "lora2"]


def test_sharpness_zero_and_strength_one_is_composite() -> None:
    outputs = noise(4, 1, 4, 8, 8)
    ours = run(plan_for(3, sharpness=0, strength=1), outputs)
    torch.testing.assert_close(ours, outputs[1:].mean(0))


def test_each_half_follows_the_lora_that_acts_there() -> None:
    base = noise(1, 4, 8, 8)
    left, right = base.clone(), base.clone()
    left[..., :4] += 1.0
    right[..., 4:] -= 2.0
    ours = run(plan_for(2, sharpness=50, strength=1), torch.stack([base, left, right]))
    torch.testing.assert_close(ours[..., :4], left[..., :4])
    torch.testing.assert_close(ours[..., 4:], right[..., 4:])


def test_loras_that_do_nothing_leave_the_base_model() -> None:
    base = noise(2, 4, 8, 8)
    assert torch.equal(run(plan_for(3), base.expand(4, -1, -1, -1, -1)), base)
    one_idle = torch.stack([base, base, base + noise(2, 4, 8, 8)])
    assert run(plan_for(2), one_idle).isfinite().all()


def test_weights_do_not_depend_on_the_size_of_a_departure() -> None:
    base, first, second = noise(3, 1, 4, 8, 8)
    small = run(plan_for(2, strength=1), torch.stack([base, base + first, base + second]))
    large = run(plan_for(2, strength=1), torch.stack([base, base + 9 * first, base + 9 * second]))
    torch.testing.assert_close(9 * (small - base), large - base)


def test_half_precision_goes_in_and_out() -> None:
    outputs = noise(3, 1, 4, 8, 8)
    ours = run(plan_for(2), outputs.half())
    assert ours.dtype == torch.float16
    torch.testing.assert_close(ours.double(), run(plan_for(2), outputs), rtol=0.02, atol=0.02)


OPTIONS = [
    ({"scale": "rms"}, {"scale": "rms"}),
    ({"scale": "max", "patch": 2}, {"scale": "max", "patch": 2}),
    ({"scale": "joint", "sharpness": 2.0}, {"scale": "joint", "sharpness": 2.0}),
    ({"bands": "apart", "patch": 3}, {"band_sharpness": (4.0, 4.0), "patch": 3}),
]


@pytest.mark.parametrize(("options", "reference"), OPTIONS)
def test_options_match_the_loop_over_locations(
    options: dict[str, Any], reference: dict[str, Any]
) -> None:
    outputs = noise(4, 2, 3, 5, 4)
    ours = run(plan_for(3, **options), outputs)
    np.testing.assert_allclose(
        ours.numpy(), selected_with(outputs.numpy(), **reference), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(
    ("bands", "first", "last"), [("low_first", (4, 0), (0, 4)), ("high_first", (0, 4), (4, 0))]
)
def test_bands_take_turns_in_being_selected(bands: str, first: Any, last: Any) -> None:
    plans = schedule("select", [Member("x"), Member("y")], 9, bands=bands)
    outputs = noise(3, 2, 3, 4, 6)
    between = tuple(0.75 * a + 0.25 * b for a, b in zip(first, last, strict=True))
    for index, sharp in ((0, first), (8, last), (2, between)):
        reference = selected_with(outputs.numpy(), band_sharpness=sharp)
        np.testing.assert_allclose(run(plans[index], outputs).numpy(), reference, rtol=1e-9)


def test_sharpness_changes_over_the_run() -> None:
    plans = schedule("select", [Member("x"), Member("y")], 5, sharpness=8, sharpness_end=0)
    outputs = noise(3, 1, 3, 4, 4)
    for index, sharpness in enumerate((8.0, 6.0, 4.0, 2.0, 0.0)):
        reference = selected_with(outputs.numpy(), sharpness=sharpness)
        np.testing.assert_allclose(run(plans[index], outputs).numpy(), reference, rtol=1e-9)


def test_the_prompt_decides_where_the_departures_do_not() -> None:
    members = [Member("x", relevance=0.9), Member("y", relevance=0.1), Member("z")]
    outputs = noise(4, 1, 3, 4, 4)
    plan = schedule("select", members, 1, prior=1.0, sharpness=0, strength=1)[0]
    usual = 0.5
    shares = np.array([0.9 / usual, 0.1 / usual, 1.0])
    shares /= shares.sum()
    expected = sum(s * o for s, o in zip(shares, outputs.numpy()[1:], strict=True))
    np.testing.assert_allclose(run(plan, outputs).numpy(), expected, rtol=1e-9)
    assert prior_logits([None, None], 1.0) == [0.0, 0.0]
    assert all(map(math.isfinite, prior_logits([0.0, 1.0], 2.0)))


def test_guided_departures_weigh_both_branches() -> None:
    outputs = noise(3, 4, 3, 4, 4)
    step = Step(0, 1, guidance=7.5)
    members = [Member("x"), Member("y")]
    plan = select(step, members, none(), guidance="before")
    reference = selected_with(outputs.numpy(), guidance=7.5)
    np.testing.assert_allclose(run(plan, outputs).numpy(), reference, rtol=1e-8)
    apart = select(step, members, none())
    separate = selected_with(outputs.numpy())
    np.testing.assert_allclose(run(apart, outputs).numpy(), separate, rtol=1e-9)
    unknown = select(Step(0, 1), members, none(), guidance="before")
    np.testing.assert_allclose(run(unknown, outputs).numpy(), separate, rtol=1e-9)


def keys(members: list[Member], *observed: Any, **options: Any) -> list[str]:
    plan = select(Step(len(observed), 9, observed=observed), members, none(), **options)
    return [item.key for item in plan.passes]


def test_a_style_is_in_every_pass() -> None:
    members = [Member("a"), Member("b"), Member("ink", 0.5, category="style")]
    assert keys(members) == ["ink", "a+ink", "b+ink"]
    plan = select(Step(0, 9), members, none())
    assert all(item.weights["ink"] == 0.5 for item in plan.passes)
    assert keys(members, keep="none") == ["base", "a", "b", "ink"]


def test_the_users_label_wins_over_the_category() -> None:
    local = Member("ink", category="style", scope="local")
    everywhere = Member("fog", category="background", scope="global")
    assert keys([Member("a"), local]) == ["base", "a", "ink"]
    assert keys([Member("a"), Member("b"), everywhere]) == ["fog", "a+fog", "b+fog"]


def test_where_nobody_is_left_to_select_nothing_is_kept_apart() -> None:
    styles = [Member("ink", category="style"), Member("oil", category="style")]
    assert keys(styles) == ["base", "ink", "oil"]
    assert keys([*styles, Member("a")]) == ["a+ink+oil"]


def test_a_lora_that_changes_all_places_alike_is_found_out() -> None:
    members = [Member("a"), Member("b"), Member("fog")]
    plan = select(Step(0, 9), members, none())
    assert [item.key for item in plan.passes] == ["base", "a", "b", "fog"]
    assert plan.observe is not None
    outputs = torch.zeros(4, 1, 4, 8, 8)
    outputs[1, ..., :4] = 1.0  # half of the places
    outputs[2, ..., 0, 0] = 5.0
    outputs[3] = 0.25
    seen = plan.observe(outputs[0], outputs)
    assert seen == {
        "spread:a": pytest.approx(0.5),
        "spread:b": pytest.approx(1 / 64),
        "spread:fog": pytest.approx(1.0),
    }
    assert keys(members, seen) == ["fog", "a+fog", "b+fog"]
    assert keys(members, seen, keep="label") == ["base", "a", "b", "fog"]
    assert select(Step(1, 9, observed=(seen,)), members, none()).observe is None
    labelled = [Member("a"), Member("b"), Member("fog", category="background")]
    assert keys(labelled, seen) == ["base", "a", "b", "fog"]


def test_beside_a_labelled_style_the_others_are_measured() -> None:
    ink = Member("ink", category="style")
    plan = select(Step(0, 9), [Member("a"), Member("b"), Member("fog"), ink], none())
    assert [item.key for item in plan.passes] == ["ink", "a+ink", "b+ink", "fog+ink"]
    assert plan.observe is not None
    outputs = torch.zeros(4, 1, 4, 8, 8)
    outputs[1, ..., :4] = 1.0
    outputs[2, ..., 0, 0] = 5.0
    outputs[3] = 0.25
    seen = plan.observe(outputs[0], outputs)
    assert keys([Member("a"), Member("b"), Member("fog"), ink], seen) == [
        "fog+ink",
        "a+fog+ink",
        "b+fog+ink",
    ]
    known = [Member("a", scope="local"), Member("b", category="object"), ink]
    assert select(Step(0, 9), known, none()).observe is None


def test_slots_are_renewed_in_turn() -> None:
    members = [Member("a"), Member("b")]
    plans = schedule("select", members, 6, "uniform:1+turns")
    assert not any(item.may_reuse for plan in plans for item in plan.passes)
    plans = schedule("select", members, 9, "uniform:2+turns")
    full = [[item.key for item in plan.passes if not item.may_reuse] for plan in plans]
    assert full == [["base", "a", "b"], [], ["base"], [], ["a"], [], ["b"], [], ["base"]]


def test_what_is_everywhere_may_be_weaker() -> None:
    members = [Member("a"), Member("b", 0.5), Member("ink", 0.8, scope="global")]
    (plan,) = schedule("select", members, 1, common=0.5)
    assert [dict(single.weights) for single in plan.passes] == [
        {"ink": 0.4},
        {"a": 1.0, "ink": 0.4},
        {"b": 0.5, "ink": 0.4},
    ]
    (single,) = schedule("select", [members[0], members[2]], 1, common=0.5)
    assert dict(single.passes[0].weights) == {"a": 1.0, "ink": 0.4}
