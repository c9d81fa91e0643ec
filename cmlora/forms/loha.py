"""LoHa: the entry-by-entry product of two low-rank matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora.forms.change import Change, Parts, additive, low_rank, matrix


def loha(parts: Parts) -> Change:
    """``s (B1 A1) * (B2 A2)``, where * multiplies entries; s = alpha / R.

    arXiv:2108.06098, LyCORIS arXiv:2309.14859. Entry by entry, a product of ranks R is a low-rank
    matrix of rank R^2, whose factors are the products of all pairs of columns and of rows.
    With cores ``t1`` and ``t2`` (R, R, kh, kw) each matrix is a Tucker product.
    """
    ups = parts["hada_w1_a"], parts["hada_w2_a"]
    downs = parts["hada_w1_b"], parts["hada_w2_b"]
    rank = len(downs[0])
    scale = parts.ratio(rank)
    if "hada_t1" in parts or "hada_t2" in parts:
        cores = parts["hada_t1"], parts["hada_t2"]
        first, second = map(_tucker, cores, ups, downs)
        return additive(first * second * scale)
    up = torch.einsum("oi,oj->oij", *map(matrix, ups)).flatten(1)
    down = torch.einsum("in,jn->ijn", *map(matrix, downs)).flatten(0, 1)
    return low_rank(down, up, scale, (len(up), *downs[0].shape[1:]))


def _tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(O, I, kh, kw) from a core (R, Q, kh, kw), (R, O) and (Q, I)."""
    return torch.einsum("rqhw,ro,qi->oihw", core, up, down)
