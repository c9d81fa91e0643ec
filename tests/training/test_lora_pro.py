"""LoRA-Pro: the two factors' steps together are the projection of the full gradient."""

import pytest
import torch
from torch import Tensor, nn

from cmlora.adapters.training.optim import make
from cmlora.adapters.training.optim.lora_pro import adjusted


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_lora_pro_is_the_projection_of_the_full_gradient() -> None:
    for seed, scale in ((0, 1.0), (5, 2.0), (9, 0.5)):
        a, b = noise(3, 12, seed=seed).double(), noise(10, 3, seed=seed + 1).double()
        g = noise(10, 12, seed=seed + 2).double()
        ga, gb = scale * b.T @ g, scale * g @ a.T
        ha, hb = adjusted(a, b, ga, gb, scale)
        whole = scale * (b @ ha + hb @ a)
        pa = torch.linalg.pinv(a) @ a
        pb = b @ torch.linalg.pinv(b)
        eye = torch.eye
        expected = g - (eye(10).double() - pb) @ g @ (eye(12).double() - pa)
        assert torch.allclose(whole, expected, atol=1e-6)
        # No other pair comes closer, plain LoRA's least of all.
        plain = scale * (b @ ga + gb @ a)
        error = float((whole - g).norm())
        assert error <= float((plain - g).norm())
        for other in range(5):
            da, db = noise(3, 12, seed=other).double(), noise(10, 3, seed=other + 7).double()
            moved = scale * (b @ (ha + 0.1 * da) + (hb + 0.1 * db) @ a)
            assert error <= float((moved - g).norm()) + 1e-9
        # Of the pairs with the same effect it is the one closest to the gradients.
        x = noise(3, 3, seed=3).double()
        near = (ha - ga).square().sum() + (hb - gb).square().sum()
        for step in (1e-2, -1e-2):
            far = (ha + step * x @ a - ga).square().sum() + (hb - step * b @ x - gb).square().sum()
            assert far >= near
        descent = (ga * ha).sum() + (gb * hb).sum()
        assert float(descent) == pytest.approx(float(whole.square().sum()), rel=1e-6)


def test_lora_pro_starts_from_a_zero_factor() -> None:
    a, g = noise(3, 12), noise(10, 12, seed=1)
    ha, hb = adjusted(a, torch.zeros(10, 3), torch.zeros(3, 12), 2 * g @ a.T, 2.0)
    assert not ha.any()
    assert torch.allclose(2 * hb @ a, g @ torch.linalg.pinv(a) @ a, atol=1e-5)


def test_lora_pro_on_convolutions_and_with_full_moments() -> None:
    down, up = nn.Parameter(noise(2, 4, 3, 3)), nn.Parameter(noise(6, 2, 1, 1, seed=1))
    for moments, size in (("factor", 2 * 2 * (36 + 6)), ("full", 2 * 6 * 36)):
        group = {"params": [down, up], "strength": 0.5}
        made = make("lora_pro", [group], 1e-3, {"moments": moments})
        down.grad, up.grad = noise(2, 4, 3, 3, seed=2), noise(6, 2, 1, 1, seed=3)
        made.step()
        assert (
            sum(v.numel() for s in made.state.values() for k, v in s.items() if k != "count")
            == size
        )
