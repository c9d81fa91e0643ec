"""Which entries of a matrix stay: by magnitude, by chance, by both, or all but the extremes."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(matrix: Tensor, density: float) -> Tensor:
    """The int(density * entries) entries of largest magnitude, the others zero."""
    flat = matrix.flatten()
    mask = torch.zeros_like(flat)
    mask[flat.abs().topk(int(density * len(flat))).indices] = 1
    return matrix * mask.reshape(matrix.shape)


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
    ranks = matrix.abs().argsort(1).argsort(1).to(matrix.dtype)
    spread = (ranks / max(columns - 1, 1) - 0.5) * epsilon if columns > 1 else 0 * ranks
    chances = (density + spread).clamp(1e-3, 1.0)
    return matrix * torch.bernoulli(chances, generator=generator) / chances


def middle(matrix: Tensor, density: float, gamma: float) -> Tensor:
    """All but the int(gamma * entries) largest entries and the smallest beyond ``density``."""
    flat = matrix.flatten()
    order = flat.abs().argsort(descending=True, stable=True)
    first = int(gamma * len(flat))
    mask = torch.zeros_like(flat)
    mask[order[first : first + int(density * len(flat))]] = 1
    return matrix * mask.reshape(matrix.shape)
