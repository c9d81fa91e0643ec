"""The weighted sum cut to a rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cmlora.adapters.merging.factors import Pair, balanced, stack
from cmlora.adapters.merging.factors import svd as decompose
from cmlora.adapters.merging.method import share


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
        clamp: entries of the singular vectors beyond this quantile of their magnitudes are
            clipped to it, against a few burnt features.
    """
    keep = max(pair.rank for pair in pairs) if rank is None else rank
    u, s, vh = decompose(exact or stack(pairs, weights), keep)
    if clamp is not None and len(s):
        share("clamp", clamp)
        # Magnitudes, because the sign of a singular vector is arbitrary.
        values = torch.cat([u.flatten(), vh.flatten()]).abs().sort().values
        limit = float(values[round(clamp * (len(values) - 1))])
        u, vh = u.clamp(-limit, limit), vh.clamp(-limit, limit)
    return balanced(u, s, vh)
