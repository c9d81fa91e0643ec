"""Equal strength in every direction, so that a weak concept survives a dominant one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmlora.adapters.merging.factors import Pair, balanced, orthonormal, stack
from cmlora.adapters.merging.factors import svd as decompose
from cmlora.adapters.merging.method import share


def iso_c(pairs: Sequence[Pair], weights: Sequence[float], *, rank: int | None = None) -> Pair:
    """The weighted sum with all its singular values replaced by their mean (arXiv:2502.04959).

    The mean is over the directions that the sum has: counting the zeros of a low-rank update too
    would only make it weaker. Directions beyond ``rank`` are left out before, as long as it is
    known which are the strongest.
    """
    u, s, vh = _leading(pairs, weights, rank)
    return balanced(u, s.mean().expand_as(s), vh) if len(s) else Pair(u, vh)


def iso_cts(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    rank: int | None = None,
    common: float = 0.8,
) -> Pair:
    """The same with some directions reserved for what only one LoRA does.

    Args:
        pairs: factors.
        weights: of the sum, and of every LoRA's own part.
        rank: number of directions in all; those of the sum if none is given.
        common: share of the directions that the leading ones of the sum take, see `split`; the
            others are from D_j - U_c U_c^T D_j.
    """
    share("common", common)
    u, s, vh = _leading(pairs, weights, rank)
    if not len(s):
        return Pair(u, vh)
    keep, each = split(len(s), len(pairs), common)
    lefts, values, rights = [u[:, :keep]], [s[:keep]], [vh[:keep].T]
    for pair, weight in zip(pairs, weights, strict=True):
        own = pair.up - lefts[0] @ (lefts[0].T @ pair.up)
        u_own, s_own, vh_own = decompose(Pair(own * weight, pair.down))
        lefts.append(u_own[:, :each])
        values.append(s_own[:each])
        rights.append(vh_own[:each].T)
    mean = torch.cat(values).mean()
    left, right = orthonormal(torch.cat(lefts, 1)), orthonormal(torch.cat(rights, 1))
    return balanced(left, mean.expand(left.shape[1]), right.T)


def split(directions: int, loras: int, common: float) -> tuple[int, int]:
    """How many directions are common, and how many every LoRA has of its own: all are given away.

    What is not common is rounded to a multiple of the number of LoRAs, as the authors do, who have
    hundreds. Few directions would often be rounded to none, or to more than there are: everybody
    has one wherever there are enough for that and a common one, unless ``common`` is 1.

    >>> split(16, 2, 0.8), split(16, 3, 0.8), split(5, 2, 0.8), split(5, 5, 0.8)
    ((12, 2), (13, 1), (3, 1), (5, 0))
    """
    each = min(round((directions - int(directions * common)) / loras), directions // loras)
    if each == 0 and common < 1 and directions > loras:
        each = 1
    return directions - each * loras, each


def _leading(
    pairs: Sequence[Pair], weights: Sequence[float], rank: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    return decompose(stack(pairs, weights), rank)
