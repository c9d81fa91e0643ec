"""The low-rank matrix behind a part of its entries, by alternating least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora.errors import CmloraError

_RIDGE = 1e-10
_DEPTH = 5
"""Sweeps that the next one is extrapolated from."""


def complete(
    matrix: Tensor, known: Tensor, rank: int, sweeps: int = 20, ridge: float = _RIDGE
) -> tuple[Tensor, Tensor]:
    """``argmin |P(U V^T - M)|^2`` over factors of a rank, P keeping the known entries.

    From the first singular vectors of ``P(M) / p`` both factors are solved for in turn, a small
    regression per row, and U is made orthonormal before each (arXiv:2302.11068). Each sweep starts
    from what the last few would lead to if they went on as they did (Anderson acceleration, over
    spaces instead of bases); one that is worse than the best so far starts this anew.

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
    start = torch.linalg.svd(values / mask.mean(), full_matrices=False)[0][:, :rank]
    least, best = float("inf"), (start, torch.zeros(matrix.shape[1], rank, dtype=torch.double))
    before: list[Tensor] = []
    after: list[Tensor] = []
    for _ in range(sweeps):
        start = torch.linalg.qr(start)[0]
        v = _solve(start, values.T, mask.T, ridge)
        u = _solve(v, values, mask, ridge)
        lost = float(((u @ v.T - values) * mask).square().sum())
        if lost < least:
            least, best = lost, (u, v)
        else:
            before, after = [], []
        before = [*(_beside(start, x) for x in before), start][-_DEPTH:]
        after = [_beside(start, x) for x in [*after, torch.linalg.qr(u)[0]]][-_DEPTH:]
        start = _extrapolated(before, after)
    return best


def _beside(basis: Tensor, other: Tensor) -> Tensor:
    """The basis of the other's space that differs from the first basis across it only."""
    inner = basis.T @ other
    # Spaces that are nearly orthogonal have no such basis: any will do, as nothing is near yet.
    found: Tensor = other @ torch.linalg.pinv(inner, rtol=1e-6)
    return found


def _extrapolated(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Where spaces that went from ``before`` to ``after`` would stand still, to first order."""
    moves = torch.stack([(y - x).flatten() for x, y in zip(before, after, strict=True)], 1)
    if moves.shape[1] == 1:
        return after[-1]
    shares = torch.linalg.pinv(moves.diff(dim=1), rtol=1e-10) @ moves[:, -1]
    found: Tensor = after[-1] - torch.stack(after, -1).diff(dim=-1) @ shares
    return found if bool(found.isfinite().all()) else after[-1]


def _solve(basis: Tensor, values: Tensor, mask: Tensor, ridge: float) -> Tensor:
    """Row by row (n, k) the coefficients of the known entries in the basis (m, k)."""
    normal = torch.einsum("nm,mk,ml->nkl", mask, basis, basis)
    size = normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-300)
    eye = torch.eye(basis.shape[1], dtype=torch.double)
    damped = normal + (ridge * size)[:, None, None] * eye
    solved: Tensor = torch.linalg.lstsq(damped, (values @ basis)[:, :, None]).solution[:, :, 0]
    return solved
