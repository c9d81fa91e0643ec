"""A folder of LoRAs at a glance: which are alike, which are the same, which form groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmlora.adapters.analysis.alignment import cosines, gram
from cmlora.adapters.analysis.coding_rate import gain, rate, sinkhorn, spectral
from cmlora.errors import CmloraError
from cmlora.lora import LoRA

SAME = 0.999
"""Updates with a larger cosine are one LoRA, perhaps at another strength or precision."""
ALIKE = 0.3
"""Below this cosine, in size, two LoRAs have nothing to do with each other."""
_ETA = 0.5


@dataclass(frozen=True)
class Library:
    """What `survey` found.

    Args:
        names: N.
        similarity: (N, N) cosines.
        duplicates: groups of two or more names with cosines of `SAME` or more.
        clusters: all names, in groups of likes; the largest first.
        rate: nats needed to code the directions of all, see `coding_rate.rate`.
        gain: nats saved by the clusters.
    """

    names: tuple[str, ...]
    similarity: Tensor
    duplicates: tuple[tuple[str, ...], ...]
    clusters: tuple[tuple[str, ...], ...]
    rate: float
    gain: float

    def neighbours(self, count: int = 3) -> dict[str, list[tuple[str, float]]]:
        """The most similar others by name, nearest first."""
        found = {}
        for i, name in enumerate(self.names):
            others = [j for j in range(len(self.names)) if j != i]
            others.sort(key=lambda j, i=i: (-float(self.similarity[i, j]), self.names[j]))  # type: ignore[misc]
            found[name] = [(self.names[j], float(self.similarity[i, j])) for j in others[:count]]
        return found

    def json(self) -> dict[str, Any]:
        """The survey in JSON types."""
        near = self.neighbours()
        return {
            "loras": list(self.names),
            "neighbours": {name: [list(pair) for pair in pairs] for name, pairs in near.items()},
            "duplicates": [list(group) for group in self.duplicates],
            "clusters": [list(group) for group in self.clusters],
            "coding_rate": self.rate,
            "coding_gain": self.gain,
        }


def survey(loras: Sequence[LoRA], seed: int = 0) -> Library:
    """Compare all LoRAs of a library with each other.

    A LoRA is one direction in the space of all updates; the coordinates in which the coding rate
    is measured follow from the cosines alone.

    Args:
        loras: with different names, for one model.
        seed: of the clustering's restarts.

    Raises:
        CmloraError: if there are fewer than two, or they are for different models.
    """
    if len(loras) < 2:
        raise CmloraError(f"a library needs two LoRAs or more, not {len(loras)}")
    names = tuple(lora.name for lora in loras)
    tables = gram(loras)
    similarity = cosines(torch.stack(list(tables.values())).sum(0))
    similarity.fill_diagonal_(1.0)
    z = _coordinates(similarity)
    labels = cluster(similarity, seed)
    groups = [
        tuple(names[i] for i in range(len(names)) if int(labels[i]) == j)
        for j in sorted(set(labels.tolist()))
    ]
    return Library(
        names,
        similarity,
        _duplicates(names, similarity),
        tuple(sorted(groups, key=lambda group: (-len(group), group))),
        rate(z),
        gain(z, labels),
    )


def cluster(similarity: Tensor, seed: int = 0) -> Tensor:
    """Labels (N): spectral clustering of the doubly stochastic affinity of those that are alike.

    Every group that hardly touches the others adds an eigenvalue near 1, and those are counted; a
    LoRA that is like no other is a group of its own.
    """
    alike = torch.where(similarity.abs() >= ALIKE, similarity.abs(), -math.inf)
    affinity = sinkhorn(alike, _ETA)
    groups = int((torch.linalg.eigvalsh(affinity) > 0.5).sum())
    return spectral(affinity, max(groups, 1), seed)


def _coordinates(similarity: Tensor) -> Tensor:
    """(r, N) unit columns with these cosines."""
    values, vectors = torch.linalg.eigh(similarity)
    keep = values > 1e-9
    z: Tensor = (vectors[:, keep] * values[keep].sqrt()).T
    lengths: Tensor = z.norm(dim=0, keepdim=True)
    return z / lengths.clamp(min=1e-12)


def _duplicates(names: Sequence[str], similarity: Tensor) -> tuple[tuple[str, ...], ...]:
    left, groups = list(range(len(names))), []
    while left:
        first = left[0]
        group = [j for j in left if j == first or float(similarity[first, j]) >= SAME]
        left = [j for j in left if j not in group]
        if len(group) > 1:
            groups.append(tuple(names[j] for j in group))
    return tuple(groups)
