"""Slow independent references: every rule and method once more, on dense matrices in numpy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


def least_rank(values: Sequence[float], share: float) -> int:
    """Energy: the first rank whose kept energy reaches the share."""
    whole = sum(v * v for v in values)
    for rank in range(1, len(values) + 1):
        if sum(v * v for v in values[:rank]) >= share * whole * (1 - 1e-12):
            return rank
    return len(values)


def best_ranks(spectra: Sequence[Sequence[float]], each: int, most: int) -> float:
    """Budget: the least energy lost by any choice of ranks of 1 or more; all matrices alike."""
    choices = [range(1, len(values) + 1) for values in spectra]
    return min(
        sum(sum(v * v for v in values[rank:]) for values, rank in zip(spectra, ranks, strict=True))
        for ranks in itertools.product(*choices)
        if sum(ranks) * each <= most
    )


def threshold_ranks(spectra: Sequence[Sequence[float]], each: int, most: float) -> list[int]:
    """WeLore: try every threshold that occurs, lowest first."""
    normal = [
        [
            (v - values[-1]) / (values[0] - values[-1]) if values[0] > values[-1] else 1.0
            for v in values
        ]
        for values in spectra
    ]
    for threshold in sorted({z for row in normal for z in row}):
        ranks = [max(1, sum(z >= threshold for z in row)) for row in normal]
        if sum(ranks) * each <= most:
            return ranks
    return [1] * len(spectra)


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The nearest matrix of a rank."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    nearest: np.ndarray = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return nearest


def output_tail(matrix: np.ndarray, inputs: np.ndarray, rank: int) -> float:
    """The least output error of any matrix of a rank: the tail of the outputs' singular values."""
    values = np.linalg.svd(inputs @ matrix.T, compute_uv=False)
    return float(np.sqrt(sum(v * v for v in values[rank:]) / sum(v * v for v in values)))


def nearest_on_grid(matrix: np.ndarray, clip: float) -> np.ndarray:
    """MXFP4, value by value."""
    grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    result = np.zeros_like(matrix)
    for i, row in enumerate(matrix):
        for start in range(0, len(row), 32):
            block = row[start : start + 32]
            rms = np.sqrt(sum(v * v for v in block) / 32)
            unit = 2.0 ** max(-127, round(float(np.log2(max(clip * rms / 6, 2.0**-127)))))
            for j, value in enumerate(block):
                size = min(grid, key=lambda g, v=value: (abs(abs(v) / unit - g), -g))  # type: ignore[misc]
                result[i, start + j] = np.sign(value) * size * unit
    return result


def matching_pursuit(row: np.ndarray, atoms: np.ndarray, count: int) -> np.ndarray:
    """Orthogonal matching pursuit of one row, by least squares from scratch each time."""
    chosen: list[int] = []
    codes = np.zeros(len(atoms))
    residual = row
    for _ in range(count):
        matches = [
            0.0 if k in chosen else abs(float(residual @ atoms[k])) for k in range(len(atoms))
        ]
        chosen.append(int(np.argmax(matches)))
        solved = np.linalg.lstsq(atoms[chosen].T, row, rcond=None)[0]
        residual = row - solved @ atoms[chosen]
    codes[chosen] = solved
    return codes
