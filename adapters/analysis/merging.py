"""Whether two LoRAs or models can become one: common directions, and the way between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cmlora.adapters.analysis.alignment import block_of, cosines, gram
from cmlora.adapters.merging.align import align_pair
from cmlora.adapters.merging.factors import Pair, stack, svd
from cmlora.errors import CmloraError
from cmlora.lora import LoRA

GAMMA = 0.3
"""Singular values below this share of the largest say little about what a matrix does."""


def score(one: Pair, other: Pair, gamma: float = GAMMA) -> float:
    """R: how far the strong singular directions of two matrices are the same.

    ``sum_ij (u_i . u'_j)(v_i . v'_j) / n`` over singular values of at least gamma times the largest
    on either side (arXiv:2402.04051); 1 for a matrix and itself at any strength, 0 for matrices
    with nothing in common, and it has a sign.

    Args:
        one: n singular values count; n is the geometric mean where they differ.
        other: of the same shape.
        gamma: see above.
    """
    u, s, vh = svd(one)
    u_other, s_other, vh_other = svd(other)
    if not len(s) or not len(s_other):
        return 0.0
    keep, keep_other = s >= gamma * s[0], s_other >= gamma * s_other[0]
    outputs = u[:, keep].T @ u_other[:, keep_other]
    inputs = vh[keep] @ vh_other[keep_other].T
    count = math.sqrt(float(keep.sum() * keep_other.sum()))
    return float((outputs * inputs).sum()) / count


class Likeness(NamedTuple):
    """Two LoRAs in one block of the model.

    Args:
        cosine: of the updates.
        score: R, the mean over the modules weighted by their norms.
    """

    cosine: float
    score: float


@dataclass(frozen=True)
class Mergeability:
    """What is known of two LoRAs before they are merged.

    Args:
        blocks: by block that both change.
        cosine: of the whole updates.
        score: R over all modules.
        factors: by way of aligning rank units, how far the mean of the factors is from the mean of
            the updates, relative to it: what merging factors apart would lose.
    """

    blocks: dict[str, Likeness]
    cosine: float
    score: float
    factors: dict[str, float]


def mergeability(one: LoRA, other: LoRA, gamma: float = GAMMA) -> Mergeability:
    """Compare two LoRAs for one model.

    Raises:
        CmloraError: if they have no module in common, or different shapes.
    """
    shared = sorted(one.updates.keys() & other.updates.keys())
    if not shared:
        raise CmloraError(f"{one.name} and {other.name} change no module in common")
    tables = gram([one, other])
    rows: dict[str, list[tuple[float, float]]] = {}
    lost: dict[str, list[tuple[float, float]]] = {}
    for module in shared:
        pairs = [Pair(*lora.updates[module].factors()) for lora in (one, other)]
        weight = pairs[0].norm() * pairs[1].norm()
        rows.setdefault(block_of(module), []).append(
            (weight, weight * score(pairs[0], pairs[1], gamma))
        )
        if pairs[0].rank == pairs[1].rank and weight > 0:
            for how, gap in _factors(pairs[0], pairs[1]).items():
                lost.setdefault(how, []).append(gap)
    blocks = {
        block: Likeness(float(cosines(tables[block])[0, 1]), _mean(pairs))
        for block, pairs in rows.items()
    }
    whole = torch.stack(list(tables.values())).sum(0)
    every = [pair for pairs in rows.values() for pair in pairs]
    factors = {
        how: (sum(gap for gap, _ in gaps) / max(sum(size for _, size in gaps), 1e-300)) ** 0.5
        for how, gaps in lost.items()
    }
    return Mergeability(blocks, float(cosines(whole)[0, 1]), _mean(every), factors)


@dataclass(frozen=True)
class Barrier:
    """The loss on the straight line between two points.

    Args:
        places: t from 0 to 1.
        losses: at each.
    """

    places: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def height(self) -> float:
        """How far the loss rises above the straight line between its ends; 0 if nowhere."""
        first, last = self.losses[0], self.losses[-1]
        return max(
            0.0,
            *(
                loss - (1 - t) * first - t * last
                for t, loss in zip(self.places, self.losses, strict=True)
            ),
        )


def barrier(loss: Callable[[float], float], points: int = 11) -> Barrier:
    """Linear mode connectivity: is there a hill between two models?

    Args:
        loss: of the model ``(1 - t) first + t second``.
        points: how many places, both ends included.

    Raises:
        CmloraError: for fewer than three points.
    """
    if points < 3:
        raise CmloraError(f"a barrier needs 3 points or more, not {points}")
    places = tuple(index / (points - 1) for index in range(points))
    return Barrier(places, tuple(loss(t) for t in places))


def between(one: dict[str, Tensor], other: dict[str, Tensor], t: float) -> dict[str, Tensor]:
    """The parameters on the way from one model to the other."""
    return {
        key: torch.lerp(tensor, other[key].to(tensor), t) if tensor.is_floating_point() else tensor
        for key, tensor in one.items()
    }


def _factors(one: Pair, other: Pair) -> dict[str, tuple[float, float]]:
    """Squared distance of averaged factors from the averaged update, and its squared norm."""
    exact = stack([one, other], [0.5, 0.5])
    found = {}
    for how in ("none", "permute", "procrustes", "canon"):
        first = align_pair(one, one, "canon") if how == "canon" else one
        second = align_pair(other, one, how)
        mean = Pair((first.up + second.up) / 2, (first.down + second.down) / 2)
        found[how] = (stack([mean, exact], [1.0, -1.0]).norm() ** 2, exact.norm() ** 2)
    return found


def _mean(rows: list[tuple[float, float]]) -> float:
    total = sum(weight for weight, _ in rows)
    return sum(value for _, value in rows) / total if total > 0 else 0.0
