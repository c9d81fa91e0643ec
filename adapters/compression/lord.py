"""Low-rank decomposition of a layer from the statistics of its outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora.adapters.compression.form import Factors, check_keep, largest_rank


def lord(matrix: Tensor, keep: float, gram: Tensor | None = None) -> Factors | None:
    """``V V^T W`` with V the first eigenvectors of the outputs' second moments ``W G W^T``.

    The same matrix as `svd` with the same gram gives, from an (O, O) eigenproblem instead of an
    (I, I) factorisation: for convolutions, where I is many times O, far cheaper. The error of the
    outputs is the sum of the other eigenvalues (arXiv:2309.14021, without centring).

    Args:
        matrix: W (O, I).
        keep: share of the bytes.
        gram: (I, I) or in blocks (I / g, g, g); the identity if not given.
    """
    check_keep(keep)
    rank = largest_rank(matrix, keep)
    if rank < 1:
        return None
    weights = matrix.double()
    if gram is None:
        outputs = weights @ weights.T
    else:
        blocks = gram.double() if gram.ndim == 3 else gram.double()[None]
        parts = weights.reshape(len(weights), len(blocks), -1)  # (O, blocks, g)
        outputs = torch.einsum("obg,bgh,pbh->op", parts, blocks, parts)
    _, vectors = torch.linalg.eigh(outputs)
    up = vectors[:, -rank:].flip(1)
    return Factors(up.to(matrix.dtype), (up.T @ weights).to(matrix.dtype))
