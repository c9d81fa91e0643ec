"""How many directions a set of things spans, and how much is saved by splitting it.

Rates are in nats. ``Z`` is (d, n): one column per thing, of length 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 0.5


def rate(z: Tensor, epsilon: float = EPSILON) -> float:
    """``logdet(I + d / (n eps^2) Z Z^T)`` (arXiv:2301.01805), from the smaller Gram matrix."""
    d, n = z.shape
    return _logdet(z, d / (n * epsilon**2))


def split_rate(z: Tensor, membership: Tensor, epsilon: float = EPSILON) -> float:
    """``1/n sum_j logdet(I + d / eps^2 Z diag(G_j) Z^T)``, the rate given a splitting.

    Args:
        z: (d, n).
        membership: G (groups, n); its columns sum to 1.
        epsilon: the error allowed.
    """
    d, n = z.shape
    parts = [
        _logdet(z * row.sqrt(), d / (epsilon**2 * max(float(row.sum()), 1e-12))) * float(row.sum())
        for row in membership
    ]
    return sum(parts) / n


def gain(z: Tensor, labels: Tensor, epsilon: float = EPSILON) -> float:
    """What is saved by coding each group on its own; larger is a better splitting."""
    groups = torch.tensor(sorted(set(labels.tolist())))
    membership = (labels[None] == groups[:, None]).to(z.dtype)
    return rate(z, epsilon) - split_rate(z, membership, epsilon)


def sinkhorn(affinity: Tensor, eta: float = 0.1, sweeps: int = 5000) -> Tensor:
    """The doubly stochastic matrix nearest to ``affinity / eta`` in relative entropy.

    Args:
        affinity: (n, n), symmetric.
        eta: entropy weight; without it the answer would be a permutation.
        sweeps: at most.

    Returns:
        (n, n), symmetric; rows and columns sum to 1.
    """
    logits = affinity.double() / eta
    scale = torch.zeros(len(logits), dtype=torch.double)
    for _ in range(sweeps):
        new = -torch.logsumexp(logits + scale, 1)
        # The mean of the last two keeps both sides equal and converges where plain steps swing.
        if float((new - scale).abs().max()) < 1e-9:
            break
        scale = (scale + new) / 2
    return torch.exp(logits + scale[:, None] + scale[None, :])


def spectral(affinity: Tensor, groups: int, seed: int = 0) -> Tensor:
    """Labels (n) from the first eigenvectors of a doubly stochastic affinity, by k-means."""
    vectors = torch.linalg.eigh(affinity)[1][:, -groups:]
    rows = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
    generator = torch.Generator().manual_seed(seed)
    best, labels = float("inf"), torch.zeros(len(rows), dtype=torch.long)
    for _ in range(10):
        found, scatter = _kmeans(rows, groups, generator)
        if scatter < best - 1e-12:
            best, labels = scatter, found
    return labels


def _kmeans(rows: Tensor, groups: int, generator: torch.Generator) -> tuple[Tensor, float]:
    centers = rows[torch.randint(len(rows), (1,), generator=generator)]
    while len(centers) < groups:
        distance = torch.cdist(rows, centers).min(1).values.square() + 1e-12
        centers = torch.cat([centers, rows[torch.multinomial(distance, 1, generator=generator)]])
    labels = torch.zeros(len(rows), dtype=torch.long)
    for _ in range(50):
        labels = torch.cdist(rows, centers).argmin(1)
        moved = torch.stack(
            [
                rows[labels == j].mean(0) if bool((labels == j).any()) else centers[j]
                for j in range(groups)
            ]
        )
        if torch.equal(moved, centers):
            break
        centers = moved
    return labels, float((rows - centers[labels]).square().sum())


def _logdet(z: Tensor, factor: float) -> float:
    small = z.T @ z if z.shape[0] > z.shape[1] else z @ z.T
    eye = torch.eye(len(small), dtype=small.dtype)
    return float(torch.linalg.slogdet(eye + factor * small).logabsdet)
