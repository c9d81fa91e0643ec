"""Quartet: training with 4-bit products, forward and backward, simulated in full precision.

The grid and the blocks of 32 along the contracted axis are those of
`cmlora.adapters.compression.mxfp4`. After arXiv:2505.14669.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cmlora.adapters.compression.form import GRID
from cmlora.adapters.compression.mxfp4 import CLIP
from cmlora.errors import CmloraError

BLOCK = 32
_LARGEST = 6.0


@lru_cache(maxsize=8)
def hadamard(size: int = BLOCK) -> Tensor:
    """The orthonormal Hadamard matrix (n, n) for a power of two n; it is its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def blocked(rows: Tensor) -> Tensor:
    """(..., n * 32) as (..., n, 32)."""
    return rows.reshape(*rows.shape[:-1], -1, BLOCK)


def rotated(rows: Tensor, signs: Tensor | None = None) -> Tensor:
    """Every block of 32 of (..., n * 32) times the Hadamard matrix, after changing signs (32,)."""
    blocks = blocked(rows)
    if signs is not None:
        blocks = blocks * signs
    found: Tensor = blocks @ hadamard().to(rows)
    return found.flatten(-2)


def unrotated(rows: Tensor) -> Tensor:
    """The inverse of `rotated` without signs."""
    return rotated(rows)


def nearest(rows: Tensor, floor: bool = False) -> tuple[Tensor, Tensor]:
    """Blocks rounded to the grid, with the scale of least error for a Gaussian.

    The scale is ``2^round(log2(CLIP * std / 6))``.

    Args:
        rows: (..., n * 32).
        floor: round the exponent down, as the published code does; the error is then larger.

    Returns:
        The values on the grid times their scales, and where nothing was clipped.
    """
    blocks = blocked(rows)
    rms = blocks.square().mean(-1, keepdim=True).sqrt()
    wanted = torch.log2((CLIP * rms / _LARGEST).clamp(min=2.0**-126))
    scale = torch.exp2(wanted.floor() if floor else wanted.round())
    scaled = blocks / scale
    inside = scaled.abs() < _LARGEST
    return (on_grid(scaled) * scale).flatten(-2), inside.flatten(-2)


def on_grid(scaled: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with the sign of each value; ties go up.

    >>> on_grid(torch.tensor([0.24, -0.25, 2.4, 2.5, 99.0])).tolist()
    [0.0, -0.5, 2.0, 3.0, 6.0]
    """
    grid = GRID.to(scaled)
    middles = (grid[1:] + grid[:-1]) / 2
    size = grid[torch.bucketize(scaled.abs().contiguous(), middles, right=True)]
    return torch.copysign(size, scaled)


def stochastic(rows: Tensor, random: torch.Generator) -> Tensor:
    """Blocks rounded up or down at random, so that the mean is what it was.

    The scale ``2^(floor(log2 max) - 2) * 4/3`` puts the largest value between 3 and 6: nothing is
    clipped.

    Args:
        rows: (..., n * 32).
        random: of the rounding.
    """
    blocks = blocked(rows)
    most = blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-120)
    scale = torch.exp2(torch.log2(most).floor() - 2) * (4 / 3)
    scaled = (blocks / scale).abs()
    grid = GRID.to(rows)
    place = torch.bucketize(scaled.contiguous(), grid, right=True).clamp(1, len(grid) - 1)
    low, high = grid[place - 1], grid[place]
    draw = blocked(torch.rand(rows.shape, generator=random).to(rows))
    found = torch.where(draw * (high - low) < scaled - low, high, low)
    return (torch.copysign(found, blocks) * scale).flatten(-2)


class _Product(torch.autograd.Function):
    """``x W^T`` with both sides rotated and rounded, and a backward pass of 4-bit products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, random: torch.Generator) -> Tensor:
        # The rotation cancels in the product.
        qx, inside_x = nearest(rotated(x))
        qw, inside_w = nearest(rotated(weight))
        ctx.save_for_backward(qx, qw, inside_x, inside_w)
        ctx.random = random
        return qx @ qw.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        qx, qw, inside_x, inside_w = ctx.saved_tensors
        error = gradients[0]
        signs = torch.randint(0, 2, (BLOCK,), generator=ctx.random).to(error) * 2 - 1

        def product(one: Tensor, two: Tensor) -> Tensor:
            """(a, k), (b, k) to (a, b), rounded along k."""
            more = -one.shape[-1] % BLOCK
            sides = [rotated(functional.pad(side, (0, more)), signs) for side in (one, two)]
            left, right = (stochastic(side, ctx.random) for side in sides)
            return left @ right.T

        dx = product(error, qw.T) * inside_x
        dw = product(error.T, qx.T) * inside_w
        return unrotated(dx), unrotated(dw), None


class QuartetLinear(nn.Linear):
    """A linear layer whose three products are those of 4-bit numbers.

    Args:
        layer: what it replaces; its parameters are shared. Inputs are filled up to blocks of 32.
        seed: of the random rounding.
    """

    def __init__(self, layer: nn.Linear, seed: int = 0) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.random = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        more = -self.in_features % BLOCK
        rows = functional.pad(x.reshape(-1, self.in_features), (0, more)).float()
        weight = functional.pad(self.weight, (0, more)).float()
        found: Tensor = _Product.apply(rows, weight, self.random)
        found = found.to(x.dtype).reshape(*x.shape[:-1], -1)
        return found if self.bias is None else found + self.bias.to(x.dtype)


def quartet(model: nn.Module, seed: int = 0) -> int:
    """Puts `QuartetLinear` in the place of every plain linear layer; returns how many.

    Raises:
        CmloraError: if there is none.
    """
    found = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]
    if not found:
        raise CmloraError("quartet: the model has no linear layers")
    for number, (name, layer) in enumerate(found):
        parent, _, child = name.rpartition(".")
        made = QuartetLinear(layer, seed * 100_003 + number)
        setattr(model.get_submodule(parent), child, made)
    return len(found)
