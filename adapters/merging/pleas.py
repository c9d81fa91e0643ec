"""Least squares on what the layers really see: every LoRA is followed where its inputs are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmlora.adapters.merging.factors import Pair
from cmlora.errors import CmloraError


def pleas(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    grams: Sequence[Tensor],
    ridge: float = 1e-6,
) -> Pair:
    """The D with the least sum_j ||(D - w_j D_j) X_j||^2, for all LoRAs of one base model.

    D = sum_j w_j D_j G_j (sum_j G_j + lambda)^-1 with G_j = X_j X_j^T (arXiv:2407.02447, least
    squares without permutations). Its factors are [w_j B_j] and [A_j G_j S]: the rank is the sum
    of the ranks, and nothing is lost.

    Args:
        pairs: factors.
        weights: of the updates that are followed.
        grams: (M, M) second moments of the inputs while a LoRA is active, one per LoRA.
        ridge: lambda as a share of the mean diagonal entry.
    """
    total = check_grams(pairs, grams)
    # Positive even for inputs that were never seen, so that there is always a solution.
    damping = max(ridge, 1e-12) * float(total.diagonal().mean()) + 1e-300
    damped = total + damping * torch.eye(len(total), dtype=total.dtype)
    downs = [pair.down @ gram for pair, gram in zip(pairs, grams, strict=True)]
    down = torch.linalg.solve(damped, torch.cat(downs).T).T
    ups = [pair.up * weight for pair, weight in zip(pairs, weights, strict=True)]
    return Pair(torch.cat(ups, 1), down)


def check_grams(pairs: Sequence[Pair], grams: Sequence[Tensor]) -> Tensor:
    """The sum of the Gram matrices.

    Raises:
        CmloraError: if one has another width than the module, or holds NaN.
    """
    width = pairs[0].down.shape[1]
    for gram in grams:
        if gram.shape != (width, width) or not gram.isfinite().all():
            raise CmloraError(
                f"calibration data of shape {tuple(gram.shape)} does not fit {width} inputs"
                if gram.shape != (width, width)
                else "calibration data holds NaN or infinity"
            )
    return torch.stack(list(grams)).sum(0)
