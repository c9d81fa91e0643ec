"""The low-rank matrix behind a part of its entries, by alternating least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora.errors import CmloraError

_RIDGE = 1e-10


def complete(
    matrix: Tensor, known: Tensor, rank: int, sweeps: int = 20, ridge: float = _RIDGE
) -> tuple[Tensor, Tensor]:
    """``argmin |P(U V^T - M)|^2`` over factors of a rank, P keeping the known entries.

    From the first singular vectors of ``P(M) / p`` both factors are solved for in turn, a small
    regression per row, and U is made orthonormal before each (arXiv:2302.11068).

    Args:
        matrix: (O, I); what is not known does not matter.
        known: (O, I), true where it is.
        rank: k.
        sweeps: how often both factors are solved for.
        ridge: relative to the mean of the normal equations' diagonal.

    Returns:
        U (O, k) and V (I, k) in float64. A row without a known entry comes out as zeros.

    Raises:
        CmloraError: if nothing is known, or the rank is not from 1 to the smaller side.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise CmloraError(f"rank {rank} is not between 1 and {min(matrix.shape)}")
    mask = known.double()
    if not bool(known.any()):
        raise CmloraError("no entry is known")
    values = torch.where(known, matrix.double(), 0.0)
    u = torch.linalg.svd(values / mask.mean(), full_matrices=False)[0][:, :rank]
    v = torch.zeros(matrix.shape[1], rank, dtype=torch.double)
    for _ in range(sweeps):
        u = torch.linalg.qr(u)[0]
        v = _solve(u, values.T, mask.T, ridge)
        u = _solve(v, values, mask, ridge)
    return u, v


def _solve(basis: Tensor, values: Tensor, mask: Tensor, ridge: float) -> Tensor:
    """Row by row (n, k) the coefficients of the known entries in the basis (m, k)."""
    normal = torch.einsum("nm,mk,ml->nkl", mask, basis, basis)
    size = normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-300)
    eye = torch.eye(basis.shape[1], dtype=torch.double)
    damped = normal + (ridge * size)[:, None, None] * eye
    solved: Tensor = torch.linalg.lstsq(damped, (values @ basis)[:, :, None]).solution[:, :, 0]
    return solved
