"""How the entries of several matrices become one: added up, or averaged where signs agree."""

from __future__ import annotations

from collections.abc import Sequence
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
    tally = torch.zeros_like(matrices[0])
    positive = torch.zeros_like(tally, dtype=torch.bool)
    negative = torch.zeros_like(positive)
    for vote in votes:
        tally += vote if sign == "total" else vote.sign()
        positive |= vote > 0
        negative |= vote < 0
    winner = torch.where(tally >= 0, 1.0, -1.0).to(tally)
    total, count, cast = torch.zeros_like(tally), torch.zeros_like(tally), 0
    for matrix, vote, weight in zip(matrices, votes, weights, strict=True):
        agrees = vote.sign() == winner
        total += torch.where(agrees, weight * matrix, 0.0)
        count += agrees
        cast += int(vote.count_nonzero())
    places = max(int((positive | negative).sum()), 1)
    contested = int((positive & negative).sum()) / places
    return Elected(total / count.clamp_min(1), float(count.sum()) / max(cast, 1), contested)
