"""Select: every location follows the LoRAs that depart from the base there."""

from typing import Any

import numpy as np
import pytest
import torch

from cmlora.plan import Member, Plan
from cmlora.strategies import schedule
from tests.references import selected


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
