"""LoRAtorio: patches follow the LoRAs least like the base model."""

from typing import Any

import numpy as np
import pytest
import torch

from cmlora.caching.policy import none
from cmlora.plan import Member, Plan, Step
from cmlora.strategies.loratorio import loratorio
from tests.references_strategies import patchwise_softmin


def plan_for(n: int, guidance: float | None = None, **options: Any) -> Plan:
    members = [Member(f"lora{i}") for i in range(n)]
    return loratorio(Step(0, 1, guidance=guidance), members, none(), **options)


def run(plan: Plan, outputs: torch.Tensor) -> torch.Tensor:
    assert not isinstance(plan.combine, tuple)
    return plan.combine(outputs)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch": 1, "temperature": 0.1},
        {"patch": 3, "temperature": 0.3, "recentre": 1.0},
        {"top": 2, "recentre": 0.0},
        {"top": 9},
    ],
)
@pytest.mark.parametrize("guidance", [None, 7.5])
def test_it_matches_the_loop_over_patches(options: Any, guidance: float | None) -> None:
    outputs = noise(4, 2, 3, 5, 4)
    known = {"patch": 2, "temperature": 1.0, "recentre": 0.5, "top": 0, **options}
    ours = run(plan_for(3, guidance, **options), outputs)
    expected = patchwise_softmin(outputs.numpy(), **known, halves=guidance is not None)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_a_patch_follows_the_lora_that_leaves_the_base_there() -> None:
    base = noise(1, 4, 8, 8)
    left, right = base.clone(), base.clone()
    left[..., :4] *= -1
    right[..., 4:] *= -1
    ours = run(plan_for(2, temperature=0.01), torch.stack([base, left, right]))
    torch.testing.assert_close(ours[..., :4], left[..., :4])
    torch.testing.assert_close(ours[..., 4:], right[..., 4:])


def test_recentred_on_the_base_it_has_its_unconditional_branch() -> None:
    outputs = noise(3, 4, 3, 4, 4)
    ours = run(plan_for(2, 5.0, recentre=1.0), outputs)
    assert torch.equal(ours[:2], outputs[0, :2])
    assert not torch.equal(ours[2:], outputs[0, 2:])


def test_silent_places_are_like_the_base() -> None:
    outputs = torch.zeros(3, 1, 4, 4, 4)
    outputs[1, ..., 0, 0] = 1.0
    assert run(plan_for(2), outputs).isfinite().all()
