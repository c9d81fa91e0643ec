"""One strength per LoRA and input column, so that each is itself on its own inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmlora.adapters.merging.factors import Pair
from cmlora.adapters.merging.moments import diagonal, seen
from cmlora.adapters.merging.moments import total as summed


def ziplora(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    grams: Sequence[Tensor],
    steps: int = 300,
) -> Pair:
    """D = sum_a D_a diag(m_a) with the least sum_j ||(D - D_j) X_j||^2 (arXiv:2311.13600).

    The published method trains m with a penalty on overlap. Without it the optimum solves
    H m = h with H_ab = (D_a^T D_b) * (sum_j G_j) and h_a = sum_j rowsum((D_a^T D_j) * G_j).
    Conjugate gradients from m = 1 need products with factors only, and never do worse than the
    plain sum.

    Args:
        pairs: factors.
        weights: of the updates that are followed.
        grams: second moments of the inputs while a LoRA is active, one per LoRA; see
            `cmlora.adapters.calibration.Seen`.
        steps: at most this many of conjugate gradients.
    """
    total = summed(pairs[0].down.shape[1], grams)
    ups = [pair.up * weight for pair, weight in zip(pairs, weights, strict=True)]
    downs = [pair.down for pair in pairs]
    count, width = len(pairs), downs[0].shape[1]

    def products(scaled: Sequence[Tensor], gram: Tensor) -> Tensor:
        """By a the diagonal of D_a^T (sum_b B_b scaled_b) G, (N, M)."""
        met = [seen(down, gram) for down in scaled]
        rows = []
        for up, down in zip(ups, downs, strict=True):
            mixed = sum((up.T @ other @ s for other, s in zip(ups, met, strict=True)), 0 * down)
            rows.append((down * mixed).sum(0))
        return torch.stack(rows)

    def apply(m: Tensor) -> Tensor:
        return products([down * m[b] for b, down in enumerate(downs)], total)

    target = torch.zeros((count, width), dtype=total.dtype)
    for j, gram in enumerate(grams):
        alone = [down if b == j else torch.zeros_like(down) for b, down in enumerate(downs)]
        target += products(alone, gram)
    columns = torch.ones_like(target)
    left = target - apply(columns)
    # Columns differ in size by orders of magnitude: scale by the diagonal of H.
    sizes = torch.stack([(u @ d).square().sum(0) for u, d in zip(ups, downs, strict=True)])
    scale = 1 / (sizes * diagonal(total)).clamp_min(1e-300)
    step = scale * left
    energy, enough = float((left * step).sum()), 1e-24 * float((scale * target**2).sum())
    for _ in range(steps):
        if energy <= enough:
            break
        moved = apply(step)
        length = energy / float((step * moved).sum())
        columns, left = columns + length * step, left - length * moved
        before, energy = energy, float((left * scale * left).sum())
        step = scale * left + energy / before * step
    down = torch.cat([d * columns[b] for b, d in enumerate(downs)])
    return Pair(torch.cat(ups, 1), down)
