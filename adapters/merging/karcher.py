"""Means on the sphere of directions: the length is averaged apart from where a LoRA points."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    if len(pairs) == 1:
        return pairs[0]
    shares, sizes, gram = _sphere(pairs, weights)
    # From both chords: the arc cosine alone loses half the digits of a small angle.
    angle = 2 * math.atan2(
        math.sqrt(max(0.0, 2 - 2 * float(gram[0, 1]))),
        math.sqrt(max(0.0, 2 + 2 * float(gram[0, 1]))),
    )
    if math.pi - angle < 1e-4:
        raise CmloraError("two opposite LoRAs have no direction between them")
    near = angle < 1e-6
    turned = shares if near else torch.sin(shares * angle) / math.sin(angle)
    return stack(pairs, (float(shares @ sizes) * turned / sizes).tolist())


def karcher(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """The direction with the least weighted sum of squared angles to all LoRAs.

    Found by averaging in the tangent space and walking there, all in the coordinates of the
    span: only inner products are needed. The length is the weighted mean of theirs.
    """
    shares, sizes, gram = _sphere(pairs, weights)
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
        length = float((tangent @ gram @ tangent).clamp_min(0).sqrt())
        if length < _NEAR:
            break
        mean = math.cos(length) * mean + math.sin(length) * tangent / length
        mean = mean / (mean @ gram @ mean).sqrt()
    return stack(pairs, (float(shares @ sizes) * mean / sizes).tolist())


def _sphere(pairs: Sequence[Pair], weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Shares that sum to 1, norms (N,) and cosines (N, N)."""
    if any(weight < 0 for weight in weights):
        raise CmloraError("weights are shares of a mean here and cannot be negative")
    shares = torch.tensor(weights, dtype=torch.double)
    gram = torch.tensor([[inner(a, b) for b in pairs] for a in pairs], dtype=torch.double)
    sizes = gram.diagonal().sqrt()
    return shares / shares.sum(), sizes, gram / torch.outer(sizes, sizes)
