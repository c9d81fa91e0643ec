"""Means on the sphere of directions: the length is averaged apart from where a LoRA points.

A LoRA that leaves a module alone is an update of zero, which has a length but no direction: it
shortens the mean and has no say in where that points, so that a small update and none at all lead
to nearly the same length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cmlora.adapters.merging.factors import Pair, inner, stack
from cmlora.errors import CmloraError

_STEPS, _NEAR = 200, 1e-12


def slerp(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """The point of the great circle between two LoRAs that divides it as the weights do.

    d = (sin((1-t) theta) d_1 + sin(t theta) d_2) / sin(theta) with unit d_1, d_2 and
    t = w_2 / (w_1 + w_2); its length is the weighted mean of theirs.
    """
    there, shares, length, sizes, gram = _sphere(pairs, weights)
    if len(there) == 1:
        return stack(there, [length / float(sizes[0])])
    # From both chords: the arc cosine alone loses half the digits of a small angle.
    angle = 2 * math.atan2(
        math.sqrt(max(0.0, 2 - 2 * float(gram[0, 1]))),
        math.sqrt(max(0.0, 2 + 2 * float(gram[0, 1]))),
    )
    if math.pi - angle < 1e-4:
        raise CmloraError("two opposite LoRAs have no direction between them")
    near = angle < 1e-6
    turned = shares if near else torch.sin(shares * angle) / math.sin(angle)
    return stack(there, (length * turned / sizes).tolist())


def karcher(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """The direction with the least weighted sum of squared angles to all LoRAs.

    Found by averaging in the tangent space and walking there, all in the coordinates of the
    span: only inner products are needed. The length is the weighted mean of theirs.
    """
    there, shares, length, sizes, gram = _sphere(pairs, weights)
    start = shares / (shares @ gram @ shares).clamp_min(0).sqrt()
    if not torch.isfinite(start).all() or float(shares @ gram @ shares) < 1e-8:
        raise CmloraError("opposite LoRAs have no mean direction")
    mean = start
    for _ in range(_STEPS):
        cosines = (gram @ mean).clamp(-1, 1)
        angles = cosines.arccos()
        stretch = torch.where(angles > 1e-7, angles / angles.sin().clamp_min(1e-300), 1.0)
        # Logarithm of every point at the mean, averaged; e_i - cos_i mean in span coordinates.
        tangent = shares * stretch - (shares * stretch * cosines).sum() * mean
        arc = float((tangent @ gram @ tangent).clamp_min(0).sqrt())
        if arc < _NEAR:
            break
        mean = math.cos(arc) * mean + math.sin(arc) * tangent / arc
        mean = mean / (mean @ gram @ mean).sqrt()
    return stack(there, (length * mean / sizes).tolist())


class _Sphere(NamedTuple):
    """Updates as directions and lengths.

    Args:
        pairs: those that have a direction.
        shares: of these in the direction, with sum 1.
        length: the weighted mean of all lengths.
        sizes: norms (N,).
        gram: cosines (N, N).
    """

    pairs: list[Pair]
    shares: Tensor
    length: float
    sizes: Tensor
    gram: Tensor


def _sphere(pairs: Sequence[Pair], weights: Sequence[float]) -> _Sphere:
    if any(weight < 0 for weight in weights):
        raise CmloraError("weights are shares of a mean here and cannot be negative")
    rows = [(p, w, n) for p, w in zip(pairs, weights, strict=True) if (n := p.norm()) > 0]
    there = [pair for pair, _, _ in rows]
    shares = torch.tensor([weight for _, weight, _ in rows], dtype=torch.double)
    gram = torch.tensor([[inner(a, b) for b in there] for a in there], dtype=torch.double)
    sizes = torch.tensor([size for _, _, size in rows], dtype=torch.double)
    length = float(shares @ sizes) / math.fsum(weights)
    return _Sphere(there, shares / shares.sum(), length, sizes, gram / torch.outer(sizes, sizes))
