"""4-bit training: the grid, the two ways of rounding, and the products."""

import math

import pytest
import torch
from torch import Tensor, nn

from cmlora.adapters.compression.form import GRID
from cmlora.adapters.compression.mxfp4 import mxfp4
from cmlora.adapters.training.quartet import (
    BLOCK,
    QuartetLinear,
    blocked,
    hadamard,
    nearest,
    on_grid,
    quartet,
    rotated,
    stochastic,
    unrotated,
)
from cmlora.errors import CmloraError


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scaled(count: int) -> Tensor:
    """Gaussian blocks of random sizes."""
    return noise(count, BLOCK) * torch.exp2(noise(count, 1, seed=1) * 3)


def units(rows: Tensor, grid: Tensor) -> Tensor:
    """The blocks divided by the power of two, times 4/3 or not, that puts them on the grid."""
    blocks = blocked(rows)
    for factor in (1.0, 4 / 3):
        for exponent in range(-40, 40):
            ratio = blocks.abs() / (2.0**exponent * factor)
            hit = (ratio[..., None] - grid).abs().amin(-1) < 1e-4
            whole = hit.all(-1, keepdim=True) & (ratio.amax(-1, keepdim=True) > 0.4)
            blocks = torch.where(whole, torch.zeros_like(blocks), blocks)
    return blocks


def test_the_rotation_is_orthonormal() -> None:
    matrix = hadamard(BLOCK).double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(BLOCK).double(), atol=1e-6)
    rows = noise(5, 96)
    assert torch.allclose(unrotated(rotated(rows)), rows, atol=1e-5)
    signs = torch.randint(0, 2, (BLOCK,)) * 2.0 - 1
    other = noise(4, 96, seed=2)
    both = rotated(rows, signs) @ rotated(other, signs).T
    assert torch.allclose(both, rows @ other.T, atol=1e-4)


def test_thresholds() -> None:
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    above = on_grid(middles + 1e-4)
    below = on_grid(middles - 1e-4)
    assert above.tolist() == GRID[1:].tolist()
    assert below.tolist() == GRID[:-1].tolist()
    assert torch.equal(on_grid(-middles - 1e-4), -GRID[1:])


def test_everything_is_on_the_grid() -> None:
    rows = scaled(50)
    for found in (nearest(rows)[0], stochastic(rows, torch.Generator().manual_seed(0))):
        assert not units(found, GRID).any()
    assert units(rows, GRID).any()


def test_the_error_of_rounding() -> None:
    rows = scaled(4000)

    def error(found: Tensor) -> float:
        squares = (found - rows).square().sum(1) / rows.square().sum(1)
        return float(squares.mean())

    assert error(nearest(rows)[0]) <= 1.40e-2
    assert error(nearest(rows, floor=True)[0]) > 1.5 * error(nearest(rows)[0])


def test_the_scale_is_the_best_for_a_gaussian() -> None:
    values = noise(200_000).double()

    def error(clip: float) -> float:
        return float((on_grid(values * 6 / clip) * clip / 6 - values).square().mean())

    best = min((error(c / 100), c / 100) for c in range(250, 350, 2))[1]
    assert error(2.92247856) <= 1.002 * error(best)


def test_random_rounding_has_the_right_mean_and_clips_nothing() -> None:
    rows = scaled(40)
    random = torch.Generator().manual_seed(0)
    draws = torch.stack([stochastic(rows, random) for _ in range(400)]).double()
    spread = draws.std(0) / math.sqrt(len(draws))
    off = (draws.mean(0) - rows).abs()
    often = ((draws != draws.amin(0)).sum(0) > 8) & ((draws != draws.amax(0)).sum(0) > 8)
    assert float(often.double().mean()) > 0.5
    assert float((off > 4 * spread)[often].double().mean()) < 2e-3
    assert float((off > 8 * spread + 0.02 * rows.abs().amax()).sum()) == 0
    assert torch.equal(stochastic(torch.zeros(1, BLOCK), random), torch.zeros(1, BLOCK))


def test_the_packed_form_has_seventeen_bytes_for_a_block() -> None:
    form = mxfp4(noise(8, 96))
    assert form is not None
    assert form.codes.numel() + form.scales.numel() == 8 * 3 * 17


def test_a_layer_is_near_the_exact_one_and_learns() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(70, 40)
    layer = QuartetLinear(plain)
    x = noise(200, 70)
    found, expected = layer(x), plain(x)
    error = (found - expected).norm() / (expected - plain.bias).norm()
    assert float(error.detach()) < 0.25
    assert layer.weight is plain.weight
    grads = []
    for each in (layer, plain):
        plain.zero_grad()
        inputs = x.clone().requires_grad_()
        torch.autograd.backward((each(inputs) * noise(200, 40, seed=3)).sum())
        assert plain.weight.grad is not None
        assert inputs.grad is not None
        grads.append((plain.weight.grad.clone(), inputs.grad.clone()))
    for ours, exact in zip(*grads, strict=True):
        cosine = torch.nn.functional.cosine_similarity(ours.flatten(), exact.flatten(), dim=0)
        assert float(cosine) > 0.9
    target = noise(40, 70, seed=5)
    optimizer = torch.optim.SGD([layer.weight], 1.0)
    losses = []
    for _ in range(60):
        loss = (layer(x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_layers_are_replaced_once() -> None:
    inner = nn.Sequential(nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), inner, nn.LayerNorm(4))
    assert quartet(model) == 2
    assert isinstance(inner[0], QuartetLinear)
    with pytest.raises(CmloraError, match="no linear layers"):
        quartet(model)
