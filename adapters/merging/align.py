"""Two factorisations brought into step: which rank unit of one stands for which of the other."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cmlora.adapters.merging.factors import Pair, canonical
from cmlora.errors import CmloraError

Align = Literal["none", "permute", "procrustes", "canon"]


def align_pair(pair: Pair, reference: Pair, how: Align) -> Pair:
    """The same matrix with its factors as near as possible to those of a reference.

    Args:
        pair: what is rewritten.
        reference: of the same rank.
        how: ``permute`` reorders rank units (maximal tr of B_ref^T B + A_ref A^T over
            permutations), ``procrustes`` rotates them (nearest orthogonal matrix to
            B^T B_ref + A A_ref^T), ``canon`` uses the canonical factors of both.
    """
    if how == "none":
        return pair
    if how == "canon":
        found = canonical(pair)
        missing = pair.rank - found.rank  # canonical factors have no empty units
        up = torch.nn.functional.pad(found.up, (0, missing))
        return Pair(up, torch.nn.functional.pad(found.down, (0, 0, 0, missing)))
    if how == "permute":
        order = assign(reference.up.T @ pair.up + reference.down @ pair.down.T)
        return Pair(pair.up[:, order], pair.down[order])
    u, _, vh = torch.linalg.svd(pair.up.T @ reference.up + pair.down @ reference.down.T)
    turn = u @ vh
    return Pair(pair.up @ turn, turn.T @ pair.down)


def assign(similarity: Tensor) -> list[int]:
    """For every row of a square matrix its column, so that the sum of the entries is largest."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise CmloraError("matching units needs scipy; pip install scipy") from None

    _, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
    return [int(column) for column in columns]
