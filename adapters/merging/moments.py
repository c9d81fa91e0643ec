"""Products with the second moments of a layer's inputs, whole or in blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmlora.errors import CmloraError


def seen(rows: Tensor, gram: Tensor) -> Tensor:
    """``rows @ gram``, (K, M).

    Args:
        rows: (K, M).
        gram: (M, M), or (C, g, g) for C blocks of g columns that are taken as unrelated.
    """
    if gram.ndim == 2:
        return rows @ gram
    parts = rows.reshape(len(rows), *gram.shape[:2])
    return torch.einsum("kcg,cgh->kch", parts, gram).flatten(1)


def unseen(rows: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """``rows @ (gram + lambda)^-1``, with lambda a share of the mean diagonal entry."""
    blocks = gram if gram.ndim == 3 else gram[None]
    # Positive even for inputs that were never seen, so that there is always a solution.
    damping = max(ridge, 1e-12) * float(diagonal(gram).mean()) + 1e-300
    damped = blocks + damping * torch.eye(blocks.shape[-1], dtype=gram.dtype)
    parts = rows.reshape(len(rows), *blocks.shape[:2]).permute(1, 2, 0)
    solved: Tensor = torch.linalg.solve(damped, parts)
    return solved.permute(2, 0, 1).flatten(1)


def diagonal(gram: Tensor) -> Tensor:
    """(M): the mean square of every input."""
    return gram.diagonal() if gram.ndim == 2 else gram.diagonal(dim1=1, dim2=2).flatten()


def total(width: int, grams: Sequence[Tensor]) -> Tensor:
    """The sum of Gram matrices; in blocks if one of them is.

    Raises:
        CmloraError: if one has another width than the module's inputs, or holds NaN.
    """
    for gram in grams:
        shape = tuple(gram.shape)
        columns = shape[0] * (shape[1] if len(shape) == 3 else 1)
        if columns != width or shape[-1] != shape[-2]:
            raise CmloraError(f"calibration data of shape {shape} does not fit {width} inputs")
        if not gram.isfinite().all():
            raise CmloraError("calibration data holds NaN or infinity")
    return torch.stack(list(grams)).sum(0)
