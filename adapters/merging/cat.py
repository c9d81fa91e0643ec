"""The weighted sum as it is: factors side by side."""

from __future__ import annotations

from collections.abc import Sequence

from cmlora.adapters.merging.factors import Pair, stack


def cat(pairs: Sequence[Pair], weights: Sequence[float], *, exact: Pair | None = None) -> Pair:
    """Exact, its rank is the sum of the ranks: sum_j w_j B_j A_j = [w_1 B_1, ...] [A_1; ...]."""
    return exact or stack(pairs, weights)
