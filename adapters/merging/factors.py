"""Low-rank matrices as pairs of factors in double precision; the product is rarely formed.

A convolution's update is the matrix (O, I * kh * kw). M stands for the columns of that matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RESOLUTION = 1e-6
"""Singular values below this share of the largest are rounding of single-precision files."""


class Pair(NamedTuple):
    """The matrix ``up @ down``.

    Args:
        up: (O, R).
        down: (R, M).
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """R."""
        return self.up.shape[1]

    def dense(self) -> Tensor:
        """The matrix (O, M) in single precision."""
        return self.up.float() @ self.down.float()

    def norm(self) -> float:
        """Frobenius norm, from the triangular factors."""
        return float(torch.linalg.matrix_norm(_core(self)[1])) if self.rank else 0.0


def stack(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """The weighted sum: factors side by side, weights in ``up``."""
    ups = [pair.up * weight for pair, weight in zip(pairs, weights, strict=True)]
    return Pair(torch.cat(ups, 1), torch.cat([pair.down for pair in pairs], 0))


def inner(one: Pair, other: Pair) -> float:
    """Frobenius inner product, from R x R products."""
    return float(((one.up.T @ other.up) * (one.down @ other.down.T)).sum())


def svd(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of numerical rank K: U (O, K), values (K,), V^T (K, M)."""
    left, core, right = _core(pair)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    keep = int((s > RESOLUTION * s.max()).sum()) if len(s) else 0
    return left @ u[:, :keep], s[:keep], vh[:keep] @ right.T


def balanced(u: Tensor, s: Tensor, vh: Tensor) -> Pair:
    """Factors of equal norm: the root of every singular value on either side."""
    root = s.sqrt()
    return Pair(u * root, root[:, None] * vh)


def truncate(pair: Pair, rank: int | None = None) -> Pair:
    """The nearest matrix of at most this rank; at its numerical rank if none is given."""
    u, s, vh = svd(pair)
    return balanced(u[:, :rank], s[:rank], vh[:rank])


def canonical(pair: Pair) -> Pair:
    """The same factors for every pair with the same product.

    Balanced singular vectors, the entry of largest magnitude of every left one positive. Unique if
    the singular values are distinct.
    """
    u, s, vh = svd(pair)
    if not len(s):
        return Pair(u, vh)
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
    sign = torch.where(largest < 0, -1.0, 1.0).to(u)
    return balanced(u * sign, s, sign[:, None] * vh)


def nearest(matrix: Tensor, rank: int) -> Pair:
    """The nearest matrix of a rank, from the eigenvectors of the smaller Gram matrix."""
    full = matrix.double()
    tall = full.shape[0] > full.shape[1]
    side = full.T if tall else full
    vectors = torch.linalg.eigh(side @ side.T).eigenvectors.flip(1)[:, :rank]
    pair = Pair(full @ vectors, vectors.T) if tall else Pair(vectors, vectors.T @ full)
    return truncate(pair)


def orthonormal(columns: Tensor) -> Tensor:
    """The nearest matrix (O, K) with orthonormal columns, for K up to O."""
    u, _, vh = torch.linalg.svd(columns, full_matrices=False)
    nearest_one: Tensor = u @ vh
    return nearest_one


def _core(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    left, left_core = torch.linalg.qr(pair.up)
    right, right_core = torch.linalg.qr(pair.down.T)
    return left, left_core @ right_core.T, right
