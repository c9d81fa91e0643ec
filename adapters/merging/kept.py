"""What a sparsifying method leaves of a matrix, without the zeros."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 2**18
"""Entries of every matrix that are unpacked at a time."""


@dataclass(frozen=True)
class Kept:
    """A matrix of which a bit per entry and the entries that are not zero are stored.

    Args:
        shape: (O, M).
        bits: (O, M / 8), rounded up, where there is anything.
        values: those entries, row after row.
        starts: (O + 1,) where the values of each row begin.
    """

    shape: tuple[int, int]
    bits: NDArray[np.uint8]
    values: NDArray[np.floating]
    starts: Sequence[int]

    @classmethod
    def of(cls, matrix: Tensor) -> Kept:
        """The same numbers."""
        # In numpy: torch counts and selects by whole numbers, sixteen bytes for every entry.
        full = matrix.numpy()
        there = full != 0
        starts = [0, *np.count_nonzero(there, axis=1).cumsum().tolist()]
        return cls((full.shape[0], full.shape[1]), np.packbits(there, axis=1), full[there], starts)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` of the matrix, the latter left out."""
        there = np.unpackbits(self.bits[first:last], axis=1, count=self.shape[1]).view(bool)
        found = np.zeros(there.shape, self.values.dtype)
        found[there] = self.values[self.starts[first] : self.starts[last]]
        return torch.from_numpy(found)


def blocks(matrices: Sequence[Kept]) -> Iterator[tuple[slice, list[Tensor]]]:
    """The same rows of all of them at a time: where they are, and the rows of each."""
    rows, columns = matrices[0].shape
    step = max(1, BLOCK // max(columns, 1))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield slice(first, last), [matrix.rows(first, last) for matrix in matrices]
