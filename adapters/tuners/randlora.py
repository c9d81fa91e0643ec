"""RandLoRA: a full-rank update from scaled sums of frozen random low-rank products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.tensors import generator, kaiming


@dataclass
class RandloraConfig(TunerConfig):
    """Settings of RandLoRA; a smaller ``r`` means more numbers to train."""

    r: int = 32
    alpha: float | None = 640
    method: ClassVar[str] = "randlora"


class RandloraLayer(TunerLayer):
    """``sum_j B_j diag(l_j) A diag(g_j)`` over ``N = ceil(min(O, I) / R)`` terms.

    arXiv:2502.00987, equation of the update. ``A`` (R, min) and ``B_j`` (max, R) are random and
    frozen; ``l`` (N, R) starts at zero and ``g`` (N, min) at ``1 / max(N, min)``. Where the layer
    has fewer outputs than inputs all is transposed, so that ``g`` acts on the short side. Bases
    come from the layer's seed and are drawn again in the backward pass; no layer shares any.
    """

    method = "randlora"
    trained = ("inner", "outer")
    costly = True

    def start(self, name: str) -> dict[str, Tensor]:
        short = min(self.matrix().shape)
        terms = -(-short // self.r[name])
        inner = torch.zeros(terms, self.r[name])
        return {"inner": inner, "outer": torch.full((terms, short), 1 / max(terms, short))}

    def update(self, name: str) -> Tensor:
        outputs, inputs = self.matrix().shape
        inner, outer = self.tensor(name, "inner"), self.tensor(name, "outer")
        total: Tensor = checkpoint(
            _terms,
            inner,
            outer,
            max(outputs, inputs),
            self.seeds[name],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        return total.T if outputs < inputs else total


def _terms(inner: Tensor, outer: Tensor, long: int, seed: int) -> Tensor:
    """The sum (long, short)."""
    random = generator(seed)
    rank, short = inner.shape[1], outer.shape[1]
    down = kaiming(rank, short, random).to(inner)
    total = inner.new_zeros(long, short)
    for scales, outer_scales in zip(inner, outer, strict=True):
        up = kaiming(long, rank, random).to(inner)
        total = total + (up * scales) @ down * outer_scales
    return total
