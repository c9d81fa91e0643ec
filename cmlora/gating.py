"""LoRAs that share out the places of every layer among them, within a single pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from torch import Tensor
from torch.nn import functional

from cmlora.plan import Gate

Forward = Callable[..., Tensor]


def gateable(layer: Any) -> bool:
    """Whether a layer is a plain LoRA around a linear layer or convolution, with no other forward.

    Others (DoRA, other adapters) cannot be taken apart; their LoRAs are added up as usual.
    """
    if type(layer) not in (Linear, Conv2d) or "forward" in vars(layer):
        return False
    base = layer.get_base_layer()
    usual = getattr(base, "groups", 1) == 1 and getattr(base, "padding_mode", "zeros") == "zeros"
    return usual and not (layer.lora_variant or any(layer.lora_bias.values()))


class GatedLoRAs:
    """What all LoRAs of a layer add to its output under a gate, as two products.

    With z_j = A_j h and u_j = B_j z_j the layer's output gains

    sum over everywhere of u_j + s sum over the others of w_j u_j,
    w(x) = softmax over j of k |u_j(x)| / mean_x |u_j|.

    |u_j| is found from z_j and the small matrix B_j^T B_j, and the weights go onto the z_j, so that
    no u_j is ever formed: the cost is that of one LoRA of all ranks together.

    Args:
        layer: for which `gateable` holds.
        gate: strength s, sharpness k, and who is added everywhere.
        names: the LoRAs that act in this layer.
        scales: what multiplies each, alpha and rank included.
    """

    def __init__(
        self, layer: Any, gate: Gate, names: Sequence[str], scales: Mapping[str, float]
    ) -> None:
        downs = [layer.lora_A[name].weight.data for name in names]
        ups = [layer.lora_B[name].weight.data.flatten(1) * scales[name] for name in names]
        rank = max(map(len, downs))
        self._down = torch.cat([_padded(down, rank, 0) for down in downs])
        stacked = torch.stack([_padded(up, rank, 1) for up in ups])  # (N, C, r)
        self._up = stacked.transpose(0, 1).flatten(1)  # (C, N r)
        wide = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
        self._gram = wide.mT @ wide
        self._gate = gate
        self._local = [i for i, name in enumerate(names) if name not in gate.everywhere]
        self._convolution = None if isinstance(layer, Linear) else layer.lora_A[names[0]]

    def __call__(self, x: Tensor) -> Tensor:
        """What is added to the layer's output.

        Args:
            x: the layer's input, (B, ..., C) with places in between, or (B, C, H, W).
        """
        given = x.to(self._down.dtype)
        if self._convolution is None:
            inner = functional.linear(given, self._down)  # (B, ..., N r)
            return functional.linear(inner * self._factors(inner), self._up)
        own = self._convolution
        inner = functional.conv2d(given, self._down, None, own.stride, own.padding, own.dilation)
        inner = inner.movedim(1, -1)
        gained = functional.linear(inner * self._factors(inner), self._up)
        return gained.movedim(-1, 1)

    def _factors(self, inner: Tensor) -> Tensor:
        """What multiplies every z_j at every place, (B, ..., N r)."""
        count, rank = self._gram.shape[:2]
        z = inner.to(self._gram.dtype).reshape(len(inner), -1, count, rank).permute(2, 0, 1, 3)
        z = z[self._local]  # (n, B, P, r)
        square = ((z @ self._gram[self._local].unsqueeze(1)) * z).sum(-1)
        size = square.clamp_min(0).sqrt()
        usual = size.mean(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
        weights = (self._gate.sharpness * size / usual).softmax(0)
        factors = size.new_ones(count, *weights.shape[1:])
        factors[self._local] = self._gate.strength * weights
        factors = factors.permute(1, 2, 0).unsqueeze(-1).expand(-1, -1, -1, rank)
        return factors.reshape(inner.shape).to(inner.dtype)


def _padded(factor: Tensor, rank: int, dimension: int) -> Tensor:
    """A factor with zeros up to a rank."""
    shape = list(factor.shape)
    shape[dimension] = rank - shape[dimension]
    return torch.cat([factor, factor.new_zeros(shape)], dimension)


def gated(layer: Any, gate: Gate, names: Sequence[str], scales: Mapping[str, float]) -> Forward:
    """A layer's forward under a gate; for the arguments see `GatedLoRAs`."""
    base, gain = layer.base_layer, GatedLoRAs(layer, gate, names, scales)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = base(x, *args, **kwargs)
        return result + gain(x).to(result.dtype)

    return forward


def decides(gate: Gate, names: Sequence[str]) -> bool:
    """Whether a gate has anything to share out among these LoRAs."""
    return sum(name not in gate.everywhere for name in names) > 1
