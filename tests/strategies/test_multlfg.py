"""MultLFG: bands follow the LoRAs whose guidance changes most in them."""

import numpy as np
import pytest
import torch

from cmlora.caching.policy import none
from cmlora.plan import Member, Plan, Step
from cmlora.strategies import _maps
from cmlora.strategies.multlfg import multlfg
from tests.references_strategies import bandwise, from_haar, haar_bands


def plan_for(n: int, guidance: float | None = None, **options: float) -> Plan:
    members = [Member(f"lora{i}") for i in range(n)]
    return multlfg(Step(1, 9, guidance=guidance), members, none(), **options)  # type: ignore[arg-type]


def run(plan: Plan, now: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    assert plan.keep
    assert plan.compare is not None
    return plan.compare(now, before)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("top", [0, 1, 2])
@pytest.mark.parametrize("first", [True, False])
def test_it_matches_the_sum_over_bands(top: int, first: bool) -> None:
    now, before = noise(3, 2, 2, 6, 4), noise(3, 2, 2, 6, 4, seed=1)
    ours = run(plan_for(3, sharpness=2.0, top=top), now, None if first else before)
    for picture in range(2):
        old = None if first else before[:, picture].numpy()
        expected = bandwise(now[:, picture].numpy(), old, 2.0, top)
        np.testing.assert_allclose(ours[picture].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_with_both_branches_it_is_the_guidance_that_is_mixed() -> None:
    now, before = noise(3, 4, 2, 4, 4), noise(3, 4, 2, 4, 4, seed=1)
    ours = run(plan_for(3, guidance=5.0), now, before)
    unconditional = now[:, :2].mean(0)
    torch.testing.assert_close(ours[:2], unconditional)
    for picture in range(2):
        guidance = [(x[:, 2 + picture] - x[:, picture]).numpy() for x in (now, before)]
        mixture = bandwise(guidance[0], guidance[1], 1.0, 0)
        np.testing.assert_allclose(
            ours[2 + picture].numpy(), unconditional[picture].numpy() + mixture, rtol=1e-9
        )


@pytest.mark.parametrize("levels", [1, 2, 6])
def test_sharpness_zero_is_composite(levels: int) -> None:
    now, before = noise(3, 2, 2, 6, 5), noise(3, 2, 2, 6, 5, seed=1)
    ours = run(plan_for(3, sharpness=0.0, levels=levels), now, before)
    torch.testing.assert_close(ours, now.mean(0))


def test_two_levels_split_the_low_band_again() -> None:
    """A LoRA that alone has changed in the lowest band alone has it."""
    now, before = noise(2, 1, 1, 4, 4), noise(2, 1, 1, 4, 4)
    before[0] -= 1.0  # a constant is nothing but lowest band
    ours = run(plan_for(2, sharpness=50.0, levels=2), now, before)
    assert float(ours.mean()) == pytest.approx(float(now[0].mean()))


def test_the_transform_is_orthonormal_and_undone() -> None:
    values = noise(2, 3, 6, 4)
    low, high = _maps.haar(values)
    bands = haar_bands(values[1, 2].numpy())
    for ours, expected in zip((low, *high), bands, strict=True):
        np.testing.assert_allclose(ours[1, 2].numpy(), expected, rtol=1e-12)
    energy = sum(float(band.square().sum()) for band in (low, *high))
    assert energy == pytest.approx(float(values.square().sum()))
    torch.testing.assert_close(_maps.unhaar(low, high, 6, 4), values)
    np.testing.assert_allclose(from_haar(bands), values[1, 2].numpy(), rtol=1e-9)
    odd = noise(1, 1, 5, 3)
    torch.testing.assert_close(_maps.unhaar(*_maps.haar(odd), 5, 3), odd)
