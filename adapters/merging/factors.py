"""Low-rank matrices as pairs of factors in double precision; the product is rarely formed.

A convolution's update is the matrix (O, I * kh * kw). M stands for the columns of that matrix.

Norms and singular vectors come from the R x R Gram matrices of the factors, which cost one matrix
product. Squaring halves the digits, so that whatever is too close to cancellation or too badly
conditioned for them is found again by QR.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

RESOLUTION = 1e-6
"""Singular values below this share of the largest are rounding of single-precision files."""

_SQUARED = 1e-8
"""Differences of squares below this share of what was subtracted have lost half their digits."""

_SPREAD = 1e-7
"""Squared singular values below this share of the largest have vectors that are not orthogonal."""

_ROWS = 1024
"""Rows of a dense matrix that are brought to double precision at a time."""

_ORTHONORMAL = 1e-9
"""How far products of singular vectors may be from the identity."""


@dataclass(frozen=True, eq=False)
class Pair:
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

    @cached_property
    def grams(self) -> tuple[Tensor, Tensor]:
        """up^T up and down down^T, (R, R)."""
        return self.up.T @ self.up, self.down @ self.down.T

    def dense(self) -> Tensor:
        """The matrix (O, M) in single precision."""
        return self.up.float() @ self.down.float()

    def norm(self) -> float:
        """Frobenius norm."""
        square, bound = self._square()
        if square > _SQUARED * bound or not bound:
            return math.sqrt(square)
        return float(torch.linalg.matrix_norm(_core(self)[1]))

    def distance(self, other: Pair) -> float:
        """Frobenius norm of the difference."""
        if torch.equal(self.up, other.up) and torch.equal(self.down, other.down):
            return 0.0
        (own, bound), (its, its_bound) = self._square(), other._square()
        square = own - 2 * inner(self, other) + its
        if square > _SQUARED * (math.sqrt(bound) + math.sqrt(its_bound)) ** 2:
            return math.sqrt(square)
        return float(torch.linalg.matrix_norm(_core(stack([self, other], [1.0, -1.0]))[1]))

    def _square(self) -> tuple[float, float]:
        """The squared norm, and what it would be if no unit cancelled another."""
        if not self.rank:
            return 0.0, 0.0
        left, right = self.grams
        return float((left * right).sum()), float(left.norm() * right.norm())


def stack(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """The weighted sum: factors side by side, weights in ``up``."""
    ups = [pair.up * weight for pair, weight in zip(pairs, weights, strict=True)]
    return Pair(torch.cat(ups, 1), torch.cat([pair.down for pair in pairs], 0))


def inner(one: Pair, other: Pair) -> float:
    """Frobenius inner product, from R x R products."""
    return float(((one.up.T @ other.up) * (one.down @ other.down.T)).sum())


def svd(pair: Pair, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition: U (O, K), values (K,), V^T (K, M).

    K is the numerical rank, or ``rank`` if that is less.
    """
    quick = principal(pair.up, *pair.grams, rank) if pair.rank <= pair.down.shape[1] else None
    if quick is not None:
        vh = quick[1] @ pair.down
        values = vh.norm(dim=1)
        return quick[0], values, vh / values[:, None]
    left, core, right = _core(pair)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    keep = int((s > RESOLUTION * s.max()).sum()) if len(s) else 0
    keep = keep if rank is None else min(keep, rank)
    return left @ u[:, :keep], s[:keep], vh[:keep] @ right.T


def balanced(u: Tensor, s: Tensor, vh: Tensor) -> Pair:
    """Factors of equal norm: the root of every singular value on either side."""
    root = s.sqrt()
    return Pair(u * root, root[:, None] * vh)


def truncate(pair: Pair, rank: int | None = None) -> Pair:
    """The nearest matrix of at most this rank; at its numerical rank if none is given."""
    return balanced(*svd(pair, rank))


def canonical(pair: Pair) -> Pair:
    """The same factors for every pair with the same product.

    Balanced singular vectors, the entry of largest magnitude of every left one positive. Unique if
    the singular values are distinct.
    """
    u, s, vh = svd(pair)
    if not len(s):
        return Pair(u, vh)
    sign = positive(u)
    return balanced(u * sign, s, sign[:, None] * vh)


def positive(columns: Tensor) -> Tensor:
    """Signs (K,) that make the entry of largest magnitude of every column (O, K) positive."""
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(columns)


def nearest(matrix: Tensor, rank: int) -> Pair:
    """The nearest matrix of a rank, from the eigenvectors of the smaller Gram matrix."""
    tall = matrix.shape[0] > matrix.shape[1]
    gram = torch.zeros(2 * (min(matrix.shape),), dtype=torch.double)
    for part in _doubled(matrix):
        gram.addmm_(part.T, part)
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    long = torch.cat([part @ vectors for part in _doubled(matrix)])
    return truncate(Pair(long, vectors.T) if tall else Pair(vectors, long.T))


def dense_norm(matrix: Tensor) -> float:
    """Frobenius norm of a matrix in single precision, to the digits of double precision."""
    return math.hypot(*(float(torch.linalg.vector_norm(part)) for part in _doubled(matrix)))


def _doubled(matrix: Tensor) -> Iterator[Tensor]:
    """Rows of a matrix, or of its transpose if that has more, in double precision.

    A few at a time: all of them would take twice the memory of the matrix.
    """
    long = matrix if matrix.shape[0] > matrix.shape[1] else matrix.T
    for part in long.chunk(-(-len(long) // _ROWS)):
        yield part.double()


def orthonormal(columns: Tensor) -> Tensor:
    """The nearest matrix (O, K) with orthonormal columns, for K up to O."""
    u, _, vh = torch.linalg.svd(columns, full_matrices=False)
    nearest_one: Tensor = u @ vh
    return nearest_one


def principal(
    up: Tensor, left: Tensor, right: Tensor, rank: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """The leading left singular vectors of up Z, for any Z with Z Z^T = right, from Gram matrices.

    With up^T up = L L^T they are up L^-T X, X the eigenvectors of L^T right L.

    Args:
        up: (O, R).
        left: up^T up.
        right: (R, R).
        rank: how many; all R if not given.

    Returns:
        The vectors u (O, K) and u^T up (K, R), or nothing if the matrices are too badly
        conditioned for squares.
    """
    count = up.shape[1]
    keep = count if rank is None else min(rank, count)
    if not 0 < count <= up.shape[0]:
        return None
    # Units of equal length on both sides: what one file has in up, another has in down.
    ratio = (right.diagonal() / left.diagonal()) ** 0.25
    if not (ratio.isfinite().all() and ratio.all()):
        return None
    both = torch.outer(ratio, ratio)
    lower, failed = torch.linalg.cholesky_ex(left * both)
    if failed:
        return None
    squares, turn = torch.linalg.eigh(lower.T @ (right / both) @ lower)
    squares, turn = squares.flip(0)[:keep], turn.flip(1)[:, :keep]
    if not squares[-1] > _SPREAD * squares[0]:
        return None
    basis = torch.linalg.solve_triangular(lower.T, turn, upper=True)
    u = up @ (ratio[:, None] * basis)
    if float((u.T @ u - torch.eye(keep).to(u)).abs().max()) > _ORTHONORMAL:
        return None
    return u, (lower @ turn).T / ratio


def _core(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    left, left_core = torch.linalg.qr(pair.up)
    right, right_core = torch.linalg.qr(pair.down.T)
    return left, left_core @ right_core.T, right
