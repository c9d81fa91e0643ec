"""SNELL: a sparse update of full rank from distances between low-dimensional vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.tensors import kaiming
from cmlora.errors import CmloraError


@dataclass
class SnellConfig(TunerConfig):
    """Settings of SNELL.

    Args:
        heads: in how many parts the vectors are compared, with alternating signs.
        factor: of the sum of distances.
        sparsity: share of the entries that are zero.
        sparsify: what survives: "official" squares the magnitudes, as the published code does,
            "soft" takes the threshold off them, as the paper prints, "hard" leaves them.
        tie_heads: start with equal heads, whose distances cancel: the start is then exactly zero.
            The published start, without it, is a small random update.
    """

    r: int = 8
    heads: int = 2
    factor: float = 0.1
    sparsity: float = 0.0
    sparsify: str = "official"
    tie_heads: bool = True
    method: ClassVar[str] = "snell"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsify not in ("official", "soft", "hard"):
            raise CmloraError(f"{self.method}: sparsify is {self.sparsify!r}, not official ...")
        if not 0 <= self.sparsity < 1:
            raise CmloraError(f"{self.method}: sparsity is {self.sparsity}, not from 0 to below 1")
        if self.r % self.heads or (self.tie_heads and self.heads % 2):
            raise CmloraError(f"{self.method}: r {self.r} and {self.heads} heads do not fit")


class SnellLayer(TunerLayer):
    """``K_oi = c sum_h (-1)^h |u_hi - v_ho|``, and only its largest entries.

    arXiv:2411.01800. ``u`` (H, I, R / H) and ``v`` (H, O, R / H) are as many numbers as a LoRA's,
    but the rank of K is full. The matrix is formed again in the backward pass instead of kept.
    """

    method = "snell"
    trained: ClassVar[tuple[str, ...]] = ("input", "output")

    def start(self, name: str) -> dict[str, Tensor]:
        outputs, inputs = self.matrix().shape
        config, random = self.config[name], self.random(name)
        width = config.r // config.heads
        found = {}
        for title, size in (("input", inputs), ("output", outputs)):
            heads = [kaiming(size, width, random) for _ in range(config.heads)]
            if config.tie_heads:
                heads = [heads[h - h % 2] for h in range(config.heads)]
            found[title] = torch.stack(heads)
        return found

    def update(self, name: str) -> Tensor:
        tensors = [self.tensor(name, title) for title in self.trained]
        options = (self.config[name], self.sparsity(name))
        result: Tensor = checkpoint(
            self._entries, options, *tensors, use_reentrant=False, preserve_rng_state=False
        )
        return result

    def sparsity(self, name: str) -> float:
        """Share of the entries of this layer that are zero."""
        return float(self.config[name].sparsity)

    def kernel(self, tensors: tuple[Tensor, ...], config: SnellConfig) -> Tensor:
        """K (O, I), before sparsification."""
        return config.factor * distances(tensors[0], tensors[1])

    def _entries(self, options: tuple[SnellConfig, float], *tensors: Tensor) -> Tensor:
        config, share = options
        return sparsified(self.kernel(tensors, config), share, config.sparsify)


def distances(inputs: Tensor, outputs: Tensor) -> Tensor:
    """``sum_h (-1)^h |u_hi - v_ho|`` (O, I) of (H, I, D) and (H, O, D)."""
    total = inputs.new_zeros(outputs.shape[1], inputs.shape[1])
    for head, (u, v) in enumerate(zip(inputs, outputs, strict=True)):
        squares = (v[:, None] - u[None]).square().sum(-1)
        # The derivative of a distance does not exist where two points meet.
        total = total + (-1) ** head * (squares + 1e-12).sqrt()
    return total


def sparsified(kernel: Tensor, share: float, form: str) -> Tensor:
    """The kernel with the given share of its entries, those of least magnitude, set to zero."""
    size = kernel.detach().abs()
    cut = round(share * size.numel())
    # A start at zero has no largest entries, and would stay there if all were dropped.
    if cut == 0 or not bool(size.any()):
        return kernel
    threshold = size.flatten().kthvalue(cut).values
    kept = size > threshold
    if form == "hard":
        return kernel * kept
    return (
        kernel * kept * size
        if form == "official"
        else (kernel - kernel.detach().sign() * threshold) * kept
    )
