"""The weighted sum in as few rank units as it needs, and PEFT's way of adding factors."""

from __future__ import annotations

from collections.abc import Sequence

from cmlora.adapters.merging.align import Align, align_pair
from cmlora.adapters.merging.factors import Pair, stack, truncate
from cmlora.errors import CmloraError


def linear(pairs: Sequence[Pair], weights: Sequence[float], *, exact: Pair | None = None) -> Pair:
    """The exact weighted sum at its numerical rank (task arithmetic on low-rank updates)."""
    return truncate(exact or stack(pairs, weights))


def factor_linear(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    align: Align = "permute",
) -> Pair:
    """Factors added apart, (sum_j sqrt(w_j) B_j) (sum_j sqrt(w_j) A_j): what PEFT calls linear.

    This is not the weighted sum: every LoRA's up also meets every other's down. It is here to
    reproduce pictures made with PEFT, which takes units as they come: ``align="none"``.

    Args:
        pairs: of equal rank.
        weights: a negative one changes the sign of its down factor.
        align: bring the rank units of all into those of the first before.

    Raises:
        CmloraError: if ranks differ.
    """
    if len({pair.rank for pair in pairs}) > 1:
        ranks = ", ".join(str(pair.rank) for pair in pairs)
        raise CmloraError(f"factors of different ranks ({ranks}) cannot be added; use linear")
    aligned = [align_pair(pair, pairs[0], align) for pair in pairs]
    up = sum(p.up * abs(w) ** 0.5 for p, w in zip(aligned, weights, strict=True))
    down = sum(
        p.down * (abs(w) ** 0.5 if w >= 0 else -(abs(w) ** 0.5))
        for p, w in zip(aligned, weights, strict=True)
    )
    assert not isinstance(up, int)
    assert not isinstance(down, int)
    return Pair(up, down)
