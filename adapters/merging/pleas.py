"""Least squares on what the layers really see: every LoRA is followed where its inputs are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmlora.adapters.merging.factors import Pair
from cmlora.adapters.merging.moments import seen, total, unseen


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
        grams: second moments of the inputs while a LoRA is active, one per LoRA; see
            `cmlora.adapters.calibration.Seen`. One that leaves the module alone has them too, and
            holds the others back on its inputs.
        ridge: lambda as a share of the mean diagonal entry.
    """
    every = total(pairs[0].down.shape[1], grams)
    downs = [seen(pair.down, gram) for pair, gram in zip(pairs, grams, strict=True)]
    ups = [pair.up * weight for pair, weight in zip(pairs, weights, strict=True)]
    return Pair(torch.cat(ups, 1), unseen(torch.cat(downs), every, ridge))
