"""Whether one LoRA drowns the others: sizes, and weights that make up for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cmlora.lora import DENOISERS

LOUD = 2.0
"""A LoRA this many times the size of the smallest is called louder."""
SOFTEST = 0.5
"""No weight below this is suggested: a small norm need not be a weak effect."""


def sizes(tables: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Norm of every LoRA over the denoiser; over everything if no LoRA changes a denoiser.

    Args:
        tables: see `cmlora.adapters.analysis.alignment.gram`.
    """
    inside = [t for block, t in tables.items() if block.partition(".")[0] in DENOISERS]
    total = torch.stack(inside or list(tables.values())).sum(0)
    return tuple(math.sqrt(max(float(value), 0.0)) for value in total.diagonal())


def weights(norms: Sequence[float]) -> tuple[float, ...]:
    """Weights that halve the imbalance on a logarithmic scale; 1 for everything near the smallest.

    ``w = sqrt(smallest / norm)``, at least `SOFTEST`, for those `LOUD` times the smallest or more.

    >>> weights([1.0, 4.0, 1.5, 0.0])
    (1.0, 0.5, 1.0, 1.0)
    """
    audible = [norm for norm in norms if norm > 0]
    least = min(audible, default=1.0)
    return tuple(
        round(max(SOFTEST, math.sqrt(least / norm)), 2) if norm >= LOUD * least else 1.0
        for norm in norms
    )


def stacking(table: Tensor, weights: Sequence[float]) -> float:
    """Size of the weighted sum relative to LoRAs that do not interact.

    ``|sum_j w_j D_j| / sqrt(sum_j |w_j D_j|^2)``: 1 if orthogonal, sqrt(N) if equal, 0 if they
    cancel.

    Args:
        table: (N, N) inner products.
        weights: N.
    """
    w = torch.tensor(weights, dtype=torch.double)
    alone = float((w.square() * table.diagonal()).sum())
    return math.sqrt(max(float(w @ table @ w), 0.0) / alone) if alone > 0 else 1.0
