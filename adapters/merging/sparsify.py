"""Which entries of a matrix stay: by magnitude, by chance, by both, or all but the extremes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def largest(matrix: Tensor, density: float) -> Tensor:
    """The int(density * entries) entries of largest magnitude, the others zero."""
    return matrix * _top(matrix.abs(), int(density * matrix.numel()))


def random(matrix: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Every entry with probability ``density``, divided by it: the mean is the matrix."""
    chances = torch.full(matrix.shape, density, dtype=matrix.dtype)
    return matrix * torch.bernoulli(chances, generator=generator) / density


def by_rank(matrix: Tensor, density: float, epsilon: float, generator: torch.Generator) -> Tensor:
    """Every entry by chance, larger ones more often; divided by its own chance.

    Within a row the chances rise evenly with the rank of the magnitude, from density - epsilon / 2
    to density + epsilon / 2 (arXiv:2406.11617, MagPrune).
    """
    columns = matrix.shape[1]
    places = torch.arange(columns).to(matrix).expand_as(matrix)
    ranks = torch.empty_like(matrix).scatter_(1, matrix.abs().argsort(1), places)
    spread = (ranks / max(columns - 1, 1) - 0.5) * epsilon if columns > 1 else 0 * ranks
    chances = (density + spread).clamp(1e-3, 1.0)
    return matrix * torch.bernoulli(chances, generator=generator) / chances


def middle(matrix: Tensor, density: float, gamma: float) -> Tensor:
    """All but the int(gamma * entries) largest entries and the smallest beyond ``density``."""
    sizes, entries = matrix.abs(), matrix.numel()
    first = int(gamma * entries)
    both = _top(sizes, min(first + int(density * entries), entries))
    return matrix * (both & ~_top(sizes, first))


def _top(sizes: Tensor, count: int) -> Tensor:
    """Where the largest entries are; of equal ones the first."""
    if not count:
        return torch.zeros_like(sizes, dtype=torch.bool)
    flat = sizes.flatten()
    # A selection in numpy takes a hundredth of the time of torch.topk for half of a matrix.
    limit = float(np.partition(flat.numpy(), len(flat) - count)[len(flat) - count])
    mask = flat > limit
    mask[(flat == limit).nonzero()[: count - int(mask.sum()), 0]] = True
    return mask.reshape(sizes.shape)
