"""CMLoRA online: phases by what is measured while the picture appears."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cmlora.caching.policy import parse
from cmlora.frequency.spectrum import energy_ratio
from cmlora.plan import Member, Plan, Step
from cmlora.strategies import METHODS

SET = [Member("fine", role="high"), Member("finer", role="high"), Member("coarse", role="low")]
UNKNOWN = [Member("x"), Member("y"), Member("z")]


def smooth(size: int = 16) -> Tensor:
    """A latent (1, 4, H, W) without high frequencies."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    return torch.stack([y, x, y + x, y * x])[None]


def noise(seed: int, size: int = 16) -> Tensor:
    return torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed))


def denoise(step: int, count: int) -> Tensor:
    """A run in which noise gives way to a smooth picture."""
    left = 1 - step / count
    return left * noise(0) + 10 * (1 - left) * smooth()


def play(
    members: list[Member],
    count: int,
    policy: str = "nonuniform",
    sample: Callable[[int, int], Tensor] = denoise,
    outputs: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> tuple[list[Plan], list[Mapping[str, float]]]:
    """Carry a schedule out with made-up outputs per pass."""
    known = {"base": noise(7), **(outputs or {})}
    strategy, refreshing = METHODS["cmlora"].object, parse(policy)
    observed: list[Mapping[str, float]] = []
    plans = []
    for index in range(count):
        step = Step(index, count, 0.0, sample(index, count), tuple(observed))
        plan = strategy(step, members, refreshing, partition="online", **options)
        if plan.observe is not None:
            stack = torch.stack([known.get(item.key, known["base"]) for item in plan.passes])
            assert step.sample is not None
            observed.append(plan.observe(step.sample, stack))
        plans.append(plan)
    return plans, observed


def dominant(plan: Plan) -> str:
    assert isinstance(plan.combine, tuple)
    return max(zip(plan.combine, (item.key for item in plan.passes), strict=True))[1]


def full(plan: Plan) -> set[str]:
    return {item.key for item in plan.passes if not item.may_reuse}


def test_the_late_phase_begins_where_the_latent_loses_its_high_frequencies() -> None:
    count, g = 60, 0.4
    refreshes = parse("nonuniform").refreshes(count)
    plans, observed = play(SET, count, decay=False, threshold=g)
    below = [float(energy_ratio(denoise(step, count)).mean()) < g for step in range(count)]
    assert any(below)
    assert not all(below)
    for step in range(count):
        last = max(refresh for refresh in refreshes if refresh <= step)
        expected = {"coarse"} if below[last] else {"fine", "finer"}
        assert dominant(plans[step]) in expected
    assert [row["step"] for row in observed] == list(refreshes)
    assert all(0 <= row["high"] <= 1 for row in observed)


def test_the_phase_can_come_back() -> None:
    def sample(step: int, count: int) -> Tensor:
        return smooth() if 10 <= step < 20 else noise(step)

    plans, _ = play(SET, 30, "uniform:2", sample, decay=False)
    names = [dominant(plan) for plan in plans]
    assert set(names[:10]) == set(names[20:]) == {"fine", "finer"}
    assert set(names[10:20]) == {"coarse"}


def test_recorded_values_of_m_calibrate_the_threshold() -> None:
    _, observed = play(SET, 60)
    values = sorted(row["high"] for row in observed)
    g = values[len(values) // 4]
    plans, again = play(SET, 60, threshold=g, decay=False)
    late = [row["late"] for row in again]
    assert 0 < sum(late) <= len(late) / 4
    assert dominant(plans[-1]) == "coarse"


def test_a_latent_that_is_not_a_number_is_not_late() -> None:
    plans, observed = play(
        SET, 20, sample=lambda step, count: torch.full((1, 4, 8, 8), torch.nan), decay=False
    )
    assert not any(row["late"] for row in observed)
    assert {dominant(plan) for plan in plans} == {"fine", "finer"}


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (12, 20), (96, 128), (9, 7)])
def test_every_size_of_latent_can_be_measured(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    _, observed = play(
        SET, 3, "none", sample=lambda step, count: torch.randn(2, 4, *size, generator=generator)
    )
    assert all(row["high"] > 0.8 for row in observed)


def test_refreshes_follow_what_was_dominant() -> None:
    plans, observed = play(SET, 60, decay=False, max_age=None)
    steps = [int(row["step"]) for row in observed]
    assert full(plans[0]) == {"fine", "finer", "coarse"}
    for step, plan in enumerate(plans[1:], start=1):
        assert full(plan) == ({dominant(plan)} if step in steps else set())


def test_known_loras_need_no_base_pass() -> None:
    for known in (
        SET,
        [replace(member, frequency=0.1 * i) for i, member in enumerate(UNKNOWN)],
        [replace(member, category="style") for member in UNKNOWN],
    ):
        plans, _ = play(known, 30)
        assert all(len(plan.passes) == 3 for plan in plans)


@pytest.mark.parametrize("members", [UNKNOWN, UNKNOWN[::-1]])
def test_what_is_measured_belongs_to_its_lora_in_any_order(members: list[Member]) -> None:
    base = noise(7)
    outputs = {"x": base + smooth(), "y": base + noise(1), "z": base}
    _, observed = play(members, 4, outputs=outputs, probes=1)
    first = observed[0]
    assert first["frequency:x"] == pytest.approx(float(energy_ratio(smooth()).mean()), abs=1e-4)
    assert first["frequency:y"] == pytest.approx(float(energy_ratio(noise(1)).mean()), abs=1e-4)
    assert "frequency:z" not in first


def test_unknown_loras_are_measured_against_the_base_model() -> None:
    base = noise(7)
    outputs = {"x": base + smooth(), "y": base + noise(1), "z": base + 0.1 * noise(2)}

    def sample(step: int, count: int) -> Tensor:
        return noise(step) if step < 18 else smooth()

    plans, observed = play(UNKNOWN, 30, sample=sample, outputs=outputs, decay=False)
    probed = [index for index, plan in enumerate(plans) if len(plan.passes) == 4]
    assert probed == [0, 6, 12]
    for index in probed:
        plan = plans[index]
        assert plan.passes[-1].key == "base"
        assert isinstance(plan.combine, tuple)
        assert plan.combine[-1] == 0.0
        assert full(plan) == {"x", "y", "z", "base"}
    for row in observed:
        if row["step"] in probed:
            for name in "xyz":
                expected = float(energy_ratio(outputs[name] - base).mean())
                assert row[f"frequency:{name}"] == pytest.approx(expected, rel=1e-5)
    # x alone is smooth: from the refresh after the first probe on it is low, and dominant late
    names = [dominant(plan) for plan in plans]
    assert "x" not in names[2:18]
    # what a probe finds changes nothing before the next refresh
    refreshes = parse("nonuniform").refreshes(30)
    assert names[0] == "x"
    assert all(names[i] == names[i - 1] for i in range(1, 30) if i not in refreshes)
    assert set(names[20:]) == {"x"}


def test_probing_can_be_turned_off() -> None:
    plans, _ = play(UNKNOWN, 30, probes=0, decay=False)
    assert all(len(plan.passes) == 3 for plan in plans)
    assert {dominant(plan) for plan in plans} == {"x", "y", "z"}


def test_loras_without_a_contribution_are_a_single_phase() -> None:
    base = noise(7)
    plans, _ = play(UNKNOWN, 40, outputs=dict.fromkeys("xyz", base), decay=False)
    assert {dominant(plan) for plan in plans[24:]} == {"x", "y", "z"}


def test_the_combination_with_a_base_pass_is_the_one_without() -> None:
    with_base, _ = play(UNKNOWN, 30)
    without, _ = play(UNKNOWN, 30, probes=0)
    assert isinstance(with_base[0].combine, tuple)
    assert with_base[0].combine[:-1] == without[0].combine
