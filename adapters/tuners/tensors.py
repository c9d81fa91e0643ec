"""Random and spectral tensors, the same wherever they are made."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora.lora import full as full


def generator(seed: int) -> torch.Generator:
    """A stream of random numbers of its own; the global one is left alone."""
    return torch.Generator("cpu").manual_seed(seed)


def uniform(shape: tuple[int, ...], bound: float, random: torch.Generator) -> Tensor:
    """Uniform numbers from -bound to bound."""
    return (torch.rand(shape, generator=random) * 2 - 1) * bound


def kaiming(rows: int, columns: int, random: torch.Generator) -> Tensor:
    """(rows, columns), uniform within 1 / sqrt(columns): how PEFT starts a down factor."""
    return uniform((rows, columns), columns**-0.5, random)


def svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors and values: (O, R), (R,), (R, I); R as far as there are."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]
