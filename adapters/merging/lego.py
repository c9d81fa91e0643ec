"""Rank units of all LoRAs in one box, clustered: similar ones become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cmlora.adapters.analysis.coding_rate import sinkhorn, spectral
from cmlora.adapters.merging.factors import Pair, canonical

_RESTARTS, _SWEEPS, _ETA = 20, 100, 0.1


def lego(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    generator: torch.Generator,
    rank: int | None = None,
    gauge: Literal["canon", "raw"] = "canon",
    reweight: bool = True,
    cluster: Literal["kmeans", "mcr2"] = "kmeans",
) -> Pair:
    """One rank unit [b; a] per cluster, as long as its members are on average (arXiv:2409.16167).

    Args:
        pairs: factors.
        weights: a unit counts with the root of its LoRA's weight on either half.
        generator: of the first centres.
        rank: number of clusters; the largest rank if none is given.
        gauge: ``canon`` writes every LoRA in its canonical factors first, so that equal LoRAs
            have equal units; ``raw`` takes units as they are in the files.
        cluster: ``kmeans`` by distance, as in the paper; ``mcr2`` by direction, from the doubly
            stochastic affinity whose groups save most coding rate (arXiv:2301.01805).
        reweight: multiply by the root of (largest rank / clusters), against the changed variance.
    """
    units = []
    for pair, weight in zip(pairs, weights, strict=True):
        own = canonical(pair) if gauge == "canon" else pair
        root = abs(weight) ** 0.5
        up = own.up * (root if weight >= 0 else -root)
        units.append(torch.cat([up.T, own.down * root], 1))
    pool = torch.cat(units)
    usual = max(len(rows) for rows in units)
    count = min(rank or usual, len(pool))
    gram = pool @ pool.T
    members = _cluster(gram, count, generator)
    if cluster == "mcr2":
        members = _alike(gram, count, generator)
    centres = (members / members.sum(0)).T @ pool
    lengths = (members / members.sum(0)).T @ pool.norm(dim=1)
    centres = centres * (lengths / centres.norm(dim=1).clamp_min(1e-300))[:, None]
    strength = (usual / count) ** 0.5 if reweight else 1.0
    up, down = centres.split([pairs[0].up.shape[0], pairs[0].down.shape[1]], 1)
    return Pair(up.T * strength, down)


def _cluster(gram: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means from inner products (U, U) alone: membership (U, count), no cluster empty.

    All restarts are carried out side by side, as one tensor (restarts, U, count).
    """
    if count == len(gram):
        return torch.eye(count).to(gram)
    labels = _distances(gram, _spread(gram, count, generator)).argmin(2)
    for _ in range(_SWEEPS):
        members = torch.nn.functional.one_hot(labels, count).to(gram)
        sizes = members.sum(1, keepdim=True)
        far = _distances(gram, members / sizes.clamp_min(1)).masked_fill(sizes == 0, torch.inf)
        lonely, now = far.min(2)
        filled = torch.nn.functional.one_hot(now, count).any(1).all(1)
        for restart in (~filled).nonzero()[:, 0].tolist():
            _fill(now[restart], lonely[restart], count)
        if torch.equal(now, labels):
            break
        labels = now
    members = torch.nn.functional.one_hot(labels, count).to(gram)
    far = _distances(gram, members / members.sum(1, keepdim=True))
    return members[int(far.gather(2, labels[..., None]).sum((1, 2)).argmin())]


def _fill(labels: Tensor, far: Tensor, count: int) -> None:
    """Give every empty cluster the unit farthest from its centre, in place."""
    far = far.clone()
    for empty in set(range(count)) - set(labels.tolist()):
        # Only units that leave somebody behind may start a new cluster.
        crowded = torch.bincount(labels, minlength=count)[labels] > 1
        unit = int(torch.where(crowded, far, -torch.inf).argmax())
        labels[unit], far[unit] = empty, -1.0


def _alike(gram: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Membership (U, count) of units that point the same way, no cluster empty."""
    lengths = gram.diagonal().sqrt().clamp_min(1e-300)
    affinity = sinkhorn(gram / torch.outer(lengths, lengths), _ETA)
    labels = spectral(affinity, count, int(torch.randint(2**31, (), generator=generator)))
    for empty in set(range(count)) - set(labels.tolist()):
        members = torch.nn.functional.one_hot(labels, count).to(gram)
        far = _distances(gram, members / members.sum(0).clamp_min(1)).gather(1, labels[:, None])
        crowded = torch.bincount(labels, minlength=count)[labels] > 1
        labels[int(torch.where(crowded, far[:, 0], -torch.inf).argmax())] = empty
    return torch.nn.functional.one_hot(labels, count).to(gram)


def _spread(gram: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """First centres (restarts, U, count): units far from each other, by chance (k-means++)."""
    units, sizes = len(gram), gram.diagonal()
    chosen = torch.randint(units, (_RESTARTS, 1), generator=generator)
    far = torch.full((_RESTARTS, units), torch.inf).to(gram)
    for _ in range(count - 1):
        last = chosen[:, -1]
        far = far.minimum(sizes + sizes[last][:, None] - 2 * gram[last]).clamp_min(0)
        far.scatter_(1, chosen, 0.0)
        left = torch.ones_like(far).scatter_(1, chosen, 0.0)
        chances = torch.where(far.any(1, keepdim=True), far, left)
        chosen = torch.cat([chosen, torch.multinomial(chances, 1, generator=generator)], 1)
    return torch.nn.functional.one_hot(chosen, units).to(gram).transpose(1, 2)


def _distances(gram: Tensor, centres: Tensor) -> Tensor:
    """Squared distances ([restarts,] U, count) of units to centres given as mixtures of units."""
    mixed = gram @ centres
    return gram.diagonal()[:, None] - 2 * mixed + (centres * mixed).sum(-2, keepdim=True)
