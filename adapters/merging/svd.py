"""The weighted sum cut to a rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmlora.adapters.merging.factors import Pair, balanced, positive, stack
from cmlora.adapters.merging.factors import svd as decompose
from cmlora.errors import CmloraError


def svd(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    rank: int | None = None,
    exact: Pair | None = None,
    clamp: float | None = None,
) -> Pair:
    """The nearest matrix of a rank to the weighted sum (Eckart-Young).

    Args:
        pairs: factors.
        weights: of the sum.
        rank: of the result; the largest of the LoRAs' if none is given.
        exact: the weighted sum, if it is at hand.
        clamp: quantile, more than 0.5, of the entries of U S and V^T together that these are
            clipped to in both directions, against a few burnt features; as PEFT's ``svd_clamp``.
            As the sign of a singular vector is arbitrary, its largest entry is positive.
    """
    keep = max(pair.rank for pair in pairs) if rank is None else rank
    u, s, vh = decompose(exact or stack(pairs, weights), keep)
    if clamp is None or not len(s):
        return balanced(u, s, vh)
    if not 0.5 < clamp <= 1:
        raise CmloraError(f"clamp is {clamp:g}, expected more than 0.5 to 1")
    sign = positive(u)
    left, right = u * (sign * s), sign[:, None] * vh
    limit = abs(quantile(torch.cat([left.flatten(), right.flatten()]), clamp))
    return Pair(left.clamp(-limit, limit), right.clamp(-limit, limit))


def quantile(values: Tensor, share: float) -> float:
    """Between the two nearest entries in proportion; `torch.quantile` takes 16 million at most."""
    ordered, place = values.sort().values, share * (len(values) - 1)
    below = int(place)
    one, other = ordered[below], ordered[min(below + 1, len(values) - 1)]
    return float(torch.lerp(one, other, place - below))
