"""The nearest matrix of lower rank, as seen by the layer's inputs if they are known."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora.adapters.compression.form import Factors, check_keep, largest_rank, root


def svd(matrix: Tensor, keep: float, gram: Tensor | None = None) -> Factors | None:
    """Truncated SVD of ``W L``, with ``L L^T`` the gram of the inputs (whitening).

    The output error is the tail of the singular values of ``W L``, which no other pair of factors
    of that rank can undercut. Without a gram it is the plain truncated SVD.

    Args:
        matrix: W (O, I).
        keep: share of the bytes.
        gram: see `cmlora.adapters.compression.form.root`.
    """
    check_keep(keep)
    rank = largest_rank(matrix, keep)
    if rank < 1:
        return None
    whiten = root(gram, matrix.shape[1])
    u, s, vh = torch.linalg.svd(matrix.double() @ whiten, full_matrices=False)
    balance = s[:rank].sqrt()
    up = u[:, :rank] * balance
    down = torch.linalg.solve_triangular(
        whiten, balance[:, None] * vh[:rank], upper=False, left=False
    )
    return Factors(up.to(matrix.dtype), down.to(matrix.dtype))
