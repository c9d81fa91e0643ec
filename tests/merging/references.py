"""Every merging formula once more, on dense matrices with numpy and loops."""

import math
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray
Reference = Callable[[Sequence[Array], Sequence[float]], Array]


def weighted_sum(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    total = np.zeros(deltas[0].shape)
    for delta, weight in zip(deltas, weights, strict=True):
        for row in range(total.shape[0]):
            for column in range(total.shape[1]):
                total[row, column] += weight * delta[row, column]
    return total


def cut(matrix: Array, rank: int) -> Array:
    u, s, vh = np.linalg.svd(matrix)
    result = np.zeros(matrix.shape)
    for k in range(min(rank, len(s))):
        result += s[k] * np.outer(u[:, k], vh[k])
    return result


def slerp(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    (one, other), t = deltas, weights[1] / (weights[0] + weights[1])
    sizes = np.linalg.norm(one), np.linalg.norm(other)
    theta = math.acos(float((one * other).sum() / (sizes[0] * sizes[1])))
    length = (1 - t) * sizes[0] + t * sizes[1]
    mixed = math.sin((1 - t) * theta) * one / sizes[0] + math.sin(t * theta) * other / sizes[1]
    return np.asarray(length * mixed / math.sin(theta))


def karcher(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    """Gradient descent on the sum of squared angles, on whole matrices."""
    shares = [weight / sum(weights) for weight in weights]
    points = [delta / np.linalg.norm(delta) for delta in deltas]
    mean = weighted_sum(points, shares)
    mean = mean / np.linalg.norm(mean)
    for _ in range(2000):
        step = np.zeros(mean.shape)
        for point, part in zip(points, shares, strict=True):
            cosine = float((point * mean).sum())
            across = point - cosine * mean
            size = float(np.linalg.norm(across))
            if size > 1e-14:
                step += part * math.atan2(size, cosine) * across / size
        mean = mean + 0.3 * step
        mean = mean / np.linalg.norm(mean)
    length = sum(p * float(np.linalg.norm(d)) for p, d in zip(shares, deltas, strict=True))
    return length * mean


def trimmed(delta: Array, density: float) -> Array:
    entries = sorted(np.ndindex(*delta.shape), key=lambda place: -abs(delta[place]))
    result = np.zeros(delta.shape)
    for place in entries[: int(density * delta.size)]:
        result[place] = delta[place]
    return result


def crumbs(delta: Array, density: float, gamma: float) -> Array:
    entries = sorted(np.ndindex(*delta.shape), key=lambda place: -abs(delta[place]))
    first = int(gamma * delta.size)
    result = np.zeros(delta.shape)
    for place in entries[first : first + int(density * delta.size)]:
        result[place] = delta[place]
    return result


def elected(kept: Sequence[Array], weights: Sequence[float], frequency: bool = False) -> Array:
    result = np.zeros(kept[0].shape)
    for place in np.ndindex(*result.shape):
        values = [float(matrix[place]) for matrix in kept]
        tally = sum((v > 0) - (v < 0) for v in values) if frequency else sum(values)
        winner = 1 if tally >= 0 else -1
        agreeing = [(v, w) for v, w in zip(values, weights, strict=True) if v * winner > 0]
        if agreeing:
            result[place] = sum(v * w for v, w in agreeing) / len(agreeing)
    return result


def ties(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    return elected([trimmed(delta, 0.5) for delta in deltas], weights)


def magnitude(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    return weighted_sum([trimmed(delta, 0.5) for delta in deltas], weights)


def breadcrumbs(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    return weighted_sum([crumbs(delta, 0.5, 0.01) for delta in deltas], weights)


def breadcrumbs_ties(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    return elected([crumbs(delta, 0.5, 0.01) for delta in deltas], weights)


EXACT: dict[str, Reference] = {
    "cat": weighted_sum,
    "linear": weighted_sum,
    "slerp": slerp,
    "karcher": karcher,
    "magnitude": magnitude,
    "ties": ties,
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs_ties,
}
"""Methods whose result is a function of the deltas alone, before any truncation."""
