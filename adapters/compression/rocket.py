"""Eigenvectors as a dictionary, and per output only the atoms that matter: no iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora.adapters.compression.form import Sparse, check_keep, root

ATOMS_PER_CODE = 2.0


def rocket(
    matrix: Tensor,
    keep: float,
    gram: Tensor | None = None,
    importance: float = 0.5,
    ratio: float = ATOMS_PER_CODE,
) -> Sparse | None:
    """ROCKET's closed form (arXiv:2602.11008) for one layer.

    The k first eigenvectors of ``(W L)^T (W L)`` are the atoms; of each output's codes the
    s = k / ratio with the largest ``|c| |L^-T b|^importance`` are kept, up to a small common pool
    that goes to the best of all outputs; then the atoms are fitted once more by least squares.

    Args:
        matrix: W (O, I).
        keep: share of the bytes, mask included.
        gram: see `cmlora.adapters.compression.form.root`.
        importance: exponent of the atom's size outside the whitened space.
        ratio: atoms per code of an output.
    """
    check_keep(keep)
    rank, codes_each = layout(matrix, keep, ratio)
    if codes_each < 1:
        return None
    whiten = root(gram, matrix.shape[1])
    seen = matrix.double() @ whiten
    _, _, vh = torch.linalg.svd(seen, full_matrices=False)
    atoms = vh[:rank]  # (k, I)
    codes = seen @ atoms.T  # (O, k)
    outside = torch.linalg.solve_triangular(whiten, atoms, upper=False, left=False)
    score = codes.abs() * outside.norm(dim=1).pow(importance)
    sure = max(1, codes_each - max(1, round(codes_each * 0.005)))
    first = score.topk(sure, dim=1).indices
    used = torch.zeros_like(codes, dtype=torch.bool).scatter_(1, first, True)
    rest = score.masked_fill(used, -1).flatten()
    pool = codes_each * len(codes) - sure * len(codes)
    used.view(-1)[rest.topk(pool).indices] = True
    codes = codes * used
    square = codes.T @ codes
    damping = 1e-9 * float(square.diagonal().mean()) or 1.0
    square = square + damping * torch.eye(rank, dtype=torch.double)
    atoms = torch.linalg.solve(square, codes.T @ seen)
    atoms = torch.linalg.solve_triangular(whiten, atoms, upper=False, left=False)
    return Sparse.of(atoms.to(matrix.dtype), codes.to(matrix.dtype))


def layout(matrix: Tensor, keep: float, ratio: float = ATOMS_PER_CODE) -> tuple[int, int]:
    """(k atoms, s codes per output), k about ratio * s, that use at most the share of the bytes."""
    outputs, inputs = matrix.shape
    size = matrix.element_size()
    allowed = keep * outputs * inputs * size
    if keep >= 1:
        allowed = outputs * inputs * size - 1
    best = (0, 0)
    for rank in range(1, min(outputs, inputs) + 1):
        codes = int((allowed - rank * inputs * size - outputs * -(-rank // 8)) // (outputs * size))
        codes = min(codes, rank)
        if codes < 1 or codes * ratio < rank - 1:
            break
        best = (rank, codes)
    return best
