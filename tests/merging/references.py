"""Every merging formula once more, on dense matrices with numpy and loops."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

Array = np.ndarray
Reference = Callable[[Sequence[Array], Sequence[float]], Array]


def weighted_sum(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    total = np.zeros(deltas[0].shape)
    for delta, weight in zip(deltas, weights, strict=True):
        for place in np.ndindex(*delta.shape):
            total[place] += weight * delta[place]
    return total


def cut(matrix: Array, rank: int) -> Array:
    u, s, vh = np.linalg.svd(matrix)
    result = np.zeros(matrix.shape)
    for k in range(min(rank, len(s))):
        result += s[k] * np.outer(u[:, k], vh[k])
    return result


def shortened(mean: Reference) -> Reference:
    """Updates of zero have a length and no direction: the mean of the others is only shorter."""

    def found(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
        rows = [(d, w) for d, w in zip(deltas, weights, strict=True) if d.any()]
        part = sum(weight for _, weight in rows) / sum(weights)
        if len(rows) == 1:
            return np.asarray(part * rows[0][0])
        return np.asarray(part * mean([d for d, _ in rows], [w for _, w in rows]))

    return found


@shortened
def slerp(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    (one, other), t = deltas, weights[1] / (weights[0] + weights[1])
    sizes = np.linalg.norm(one), np.linalg.norm(other)
    theta = math.acos(float((one * other).sum() / (sizes[0] * sizes[1])))
    length = (1 - t) * sizes[0] + t * sizes[1]
    mixed = math.sin((1 - t) * theta) * one / sizes[0] + math.sin(t * theta) * other / sizes[1]
    return np.asarray(length * mixed / math.sin(theta))


@shortened
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
    return np.asarray(length * mean)


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


def knots_ties(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    u, s, vh = np.linalg.svd(np.concatenate(deltas, 1), full_matrices=False)
    keep = int((s > 1e-6 * s[0]).sum())
    right = (s[:keep, None] * vh[:keep]).reshape(keep, len(deltas), -1)
    tasks = [trimmed(right[:, index], 0.5) for index in range(len(deltas))]
    return np.asarray(u[:, :keep] @ elected(tasks, weights))


def iso_c(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    u, s, vh = np.linalg.svd(weighted_sum(deltas, weights))
    rank = sum(value > 1e-6 * s[0] for value in s)
    mean = sum(s[:rank]) / rank
    return np.asarray(sum(mean * np.outer(u[:, k], vh[k]) for k in range(rank)))


def polar(columns: Array) -> Array:
    """The nearest orthonormal matrix through X (X^T X)^(-1/2)."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    return np.asarray(columns @ vectors @ np.diag(values**-0.5) @ vectors.T)


def tsv_m(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    lefts, values, rights = [], [], []
    for delta, weight in zip(deltas, weights, strict=True):
        u, s, vh = np.linalg.svd(delta)
        for k in range(sum(value > 1e-6 * s[0] for value in s)):
            lefts.append(u[:, k])
            values.append(weight * s[k])
            rights.append(vh[k])
    left, right = polar(np.stack(lefts, 1)), polar(np.stack(rights, 1))
    return np.asarray(left @ np.diag(values) @ right.T)


def iso_cts(deltas: Sequence[Array], weights: Sequence[float]) -> Array:
    rows = [(d, w) for d, w in zip(deltas, weights, strict=True) if d.any()]
    deltas, weights = [d for d, _ in rows], [w for _, w in rows]
    u, s, vh = np.linalg.svd(weighted_sum(deltas, weights))
    rank = sum(value > 1e-6 * s[0] for value in s)
    # Shares of the directions that are not common, to the nearest whole number, a half to the even.
    apart = int(np.rint((rank - math.floor(0.8 * rank)) / len(deltas))) * len(deltas)
    apart = apart or (len(deltas) if rank > len(deltas) else 0)
    apart = apart if apart <= rank else apart - len(deltas)
    common, each = rank - apart, apart // len(deltas)
    lefts, values, rights = list(u.T[:common]), list(s[:common]), list(vh[:common])
    shared = u[:, :common] @ u[:, :common].T
    for delta, weight in zip(deltas, weights, strict=True):
        own = np.linalg.svd(weight * (delta - shared @ delta))
        lefts += list(own[0].T[:each])
        values += list(own[1][:each])
        rights += list(own[2][:each])
    left, right = polar(np.stack(lefts, 1)), polar(np.stack(rights, 1))
    return np.asarray(float(np.mean(values)) * left @ right.T)


EXACT |= {"knots_ties": knots_ties, "iso_c": iso_c, "iso_cts": iso_cts, "tsv_m": tsv_m}


def clusters(units: Array, count: int) -> float:
    """The least k-means sum of squares over every way to divide a few units."""
    best = math.inf
    for code in range(count ** len(units)):
        labels = [code // count**index % count for index in range(len(units))]
        total = 0.0
        for label in set(labels):
            group = np.stack([u for u, own in zip(units, labels, strict=True) if own == label])
            total += float(((group - group.mean(0)) ** 2).sum())
        best = min(best, total)
    return best


Drawn = Callable[[Sequence[Array], Sequence[float], torch.Generator], Array]


def draw(chances: Array, generator: torch.Generator) -> Array:
    """Zeros and ones with these chances, drawn as the program draws them."""
    return np.asarray(torch.bernoulli(torch.from_numpy(chances), generator=generator).numpy())


def dropped(
    deltas: Sequence[Array], generator: torch.Generator, density: float = 0.5
) -> list[Array]:
    return [
        delta * draw(np.full(delta.shape, density, delta.dtype), generator) / density
        for delta in deltas
    ]


def dare_linear(
    deltas: Sequence[Array], weights: Sequence[float], generator: torch.Generator
) -> Array:
    return weighted_sum(dropped(deltas, generator), weights)


def dare_ties(
    deltas: Sequence[Array], weights: Sequence[float], generator: torch.Generator
) -> Array:
    return elected(dropped(deltas, generator), weights)


def della(deltas: Sequence[Array], weights: Sequence[float], generator: torch.Generator) -> Array:
    density, epsilon = 0.5, 0.2
    kept = []
    for delta in deltas:
        rows, columns = delta.shape
        chances = np.zeros(delta.shape, delta.dtype)
        for row in range(rows):
            order = np.argsort([abs(value) for value in delta[row]], kind="stable")
            for rank, column in enumerate(order):
                chances[row, column] = density + (rank / (columns - 1) - 0.5) * epsilon
        kept.append(delta * draw(chances, generator) / chances)
    return elected(kept, weights)


def knots_dare(
    deltas: Sequence[Array], weights: Sequence[float], generator: torch.Generator
) -> Array:
    stacked = np.concatenate([delta.astype(np.float64) for delta in deltas], 1)
    u, s, vh = np.linalg.svd(stacked, full_matrices=False)
    keep = int((s > 1e-6 * s[0]).sum())
    right = (s[:keep, None] * vh[:keep]).reshape(keep, len(deltas), -1)
    tasks = [np.ascontiguousarray(right[:, index]) for index in range(len(deltas))]
    return np.asarray(u[:, :keep] @ weighted_sum(dropped(tasks, generator), weights))


RANDOM: dict[str, Drawn] = {
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "della": della,
    "knots_dare": knots_dare,
}
"""Methods that draw random numbers; the draws are handed over, the formulas are not."""
