"""Singular vectors of all LoRAs made orthogonal, so that they do not speak over each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cmlora.adapters.merging.factors import Pair, balanced, orthonormal
from cmlora.adapters.merging.factors import svd as decompose


def tsv_m(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """U' S V'^T with U' and V' the orthonormal matrices nearest to the stacked singular vectors.

    Every LoRA gives its leading min(O, M) / n directions, or all it has if they fit
    (arXiv:2412.00081).
    """
    room = min(pairs[0].up.shape[0], pairs[0].down.shape[1])
    fits = sum(pair.rank for pair in pairs) <= room
    each = None if fits else max(1, room // len(pairs))
    lefts, values, rights = [], [], []
    for pair, weight in zip(pairs, weights, strict=True):
        u, s, vh = decompose(pair)
        lefts.append(u[:, :each] * (1.0 if weight >= 0 else -1.0))
        values.append(s[:each] * abs(weight))
        rights.append(vh[:each].T)
    strongest = torch.cat(values).argsort(descending=True, stable=True)[:room]
    left = orthonormal(torch.cat(lefts, 1)[:, strongest])
    right = orthonormal(torch.cat(rights, 1)[:, strongest])
    return balanced(left, torch.cat(values)[strongest], right.T)
