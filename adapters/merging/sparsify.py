"""Which entries of a matrix stay: by magnitude, by chance, by both, or all but the extremes."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(matrix: Tensor, density: float) -> Tensor:
    """The int(density * entries) entries of largest magnitude, the others zero."""
    return matrix.where(_top(matrix, int(density * matrix.numel())), 0)


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
    entries = matrix.numel()
    first = int(gamma * entries)
    both = _top(matrix, min(first + int(density * entries), entries))
    return matrix.where(both & ~_top(matrix, first), 0)


def _top(matrix: Tensor, count: int) -> Tensor:
    """Where the entries of largest magnitude are; of equal ones the first."""
    if not count:
        return torch.zeros_like(matrix, dtype=torch.bool)
    limit = _limit(matrix, count)
    flat = matrix.flatten()
    mask = (flat > limit).logical_or_(flat < -limit)
    equal = (flat == limit).logical_or_(flat == -limit).nonzero()
    mask[equal[: count - int(mask.count_nonzero()), 0]] = True
    return mask.reshape(matrix.shape)


def _limit(matrix: Tensor, count: int) -> float:
    """The magnitude of the ``count``-th largest entry."""
    # A selection in numpy takes a hundredth of the time of torch.topk for half of a matrix.
    sizes = matrix.abs().flatten().numpy()
    sizes.partition(len(sizes) - count)
    return float(sizes[len(sizes) - count])
