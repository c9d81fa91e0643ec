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
        agreed: how many entries have the elected sign.
        cast: how many are not zero.
        contested: at how many places there are both signs.
        places: at how many there is anything.
    """

    value: Tensor
    agreed: int
    cast: int
    contested: int
    places: int


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
    contested, places = (above & below).count_nonzero(), (above | below).count_nonzero()
    value = total / count.clamp_min(1)
    return Elected(value, int(count.sum()), cast, int(contested), int(places))
