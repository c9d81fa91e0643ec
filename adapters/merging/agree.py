"""How the entries of several matrices become one: added up, or averaged where signs agree."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Sign = Literal["total", "frequency"]


class Elected(NamedTuple):
    """A merged matrix and how much was at stake.

    Args:
        value: (O, M).
        kept: share of the non-zero entries that agree with the elected sign.
        contested: share of the places, among those where anything is non-zero, with both signs.
    """

    value: Tensor
    kept: float
    contested: float


def add(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_j w_j t_j."""
    total = torch.zeros_like(matrices[0])
    for matrix, weight in zip(matrices, weights, strict=True):
        total += weight * matrix
    return total


def elect(
    matrices: Sequence[Tensor],
    weights: Sequence[float],
    sign: Sign = "total",
    signed_vote: bool = False,
) -> Elected:
    """The mean of the weighted entries whose sign won (arXiv:2306.01708, elect and merge).

    Args:
        matrices: (O, M) each.
        weights: of the entries, after the election.
        sign: ``total`` elects the sign of the sum, ``frequency`` the more frequent one; a tie is
            positive.
        signed_vote: weigh the votes too, so that a negative weight votes for the other sign.
    """
    votes = [m * w for m, w in zip(matrices, weights, strict=True)] if signed_vote else matrices
    tally = add(
        [vote.sign() for vote in votes] if sign == "frequency" else votes, [1.0] * len(votes)
    )
    winner = tally >= 0.0
    positive, negative = [vote > 0 for vote in votes], [vote < 0 for vote in votes]
    total, count = torch.zeros_like(matrices[0]), torch.zeros_like(winner, dtype=torch.int16)
    for plus, minus, matrix, weight in zip(positive, negative, matrices, weights, strict=True):
        agrees = torch.where(winner, plus, minus)
        total.addcmul_(matrix, agrees, value=weight)
        count += agrees
    cast = sum(int(t.count_nonzero()) for t in (*positive, *negative))
    above, below = reduce(torch.logical_or, positive), reduce(torch.logical_or, negative)
    places = max(int((above | below).count_nonzero()), 1)
    contested = int((above & below).count_nonzero()) / places
    kept = int(count.sum()) / max(cast, 1)
    return Elected(total / count.clamp_min(1), kept, contested)
