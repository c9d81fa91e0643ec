"""LoRAs that share out the places of every layer among them, within a single pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from torch import Tensor
from torch.nn import functional

from cmlora.lora import full
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

    |u_j| = |L_j^T z_j| with the small L_j L_j^T = B_j^T B_j, and the weights go onto the z_j, so
    that no u_j is ever formed: the cost is that of one LoRA of all ranks together.

    Args:
        layer: for which `gateable` holds.
        gate: strength s, sharpness k, and who is added everywhere.
        names: the LoRAs that act in this layer.
        scales: what multiplies each, alpha and rank included.
    """

    def __init__(
        self, layer: Any, gate: Gate, names: Sequence[str], scales: Mapping[str, float]
    ) -> None:
        local = [name for name in names if name not in gate.everywhere]
        others = [name for name in names if name in gate.everywhere]
        factors = {n: (layer.lora_A[n].weight.data, layer.lora_B[n].weight.data) for n in names}
        self._count, self._rank = len(local), max(len(factors[name][0]) for name in local)
        ups = [_padded(factors[n][1].flatten(1) * scales[n], self._rank, 1) for n in local]
        self._roots = _roots(torch.stack(ups))
        self._down = torch.cat(
            [
                *(_padded(factors[name][0], self._rank, 0) for name in local),
                *(factors[name][0] for name in others),
            ]
        )  # (N r and more, C, ...)
        self._up = torch.cat(
            [
                *(gate.strength * up for up in ups),
                *(factors[name][1].flatten(1) * scales[name] for name in others),
            ],
            1,
        )  # (C, N r and more)
        self._sharpness = gate.sharpness
        self._convolution = None if isinstance(layer, Linear) else layer.lora_A[names[0]]

    def __call__(self, x: Tensor) -> Tensor:
        """What is added to the layer's output.

        Args:
            x: the layer's input, (B, ..., C) with places in between, or (B, C, H, W).
        """
        given, own = x.to(self._down.dtype), self._convolution
        if own is None:
            places = given.reshape(len(given), -1, given.shape[-1])
            inner = torch.bmm(self._down.expand(len(given), -1, -1), places.mT)
            gained = torch.matmul(self._weighed(inner).mT, self._up.T)
            return gained.reshape(*given.shape[:-1], -1)
        maps = functional.conv2d(given, self._down, None, own.stride, own.padding, own.dilation)
        gained = torch.matmul(self._up, self._weighed(maps.flatten(2)))
        return gained.reshape(len(given), -1, *maps.shape[2:])

    def _weighed(self, inner: Tensor) -> Tensor:
        """Every z_j times its weight at every place, (B, N r and more, P)."""
        width = self._count * self._rank
        local = inner[:, :width].view(len(inner), self._count, self._rank, -1)
        size = torch.matmul(self._roots, local.to(self._roots.dtype)).square().sum(2).sqrt_()
        usual = size.mean(2, keepdim=True).clamp_min_(torch.finfo(size.dtype).tiny)
        weights = (size / usual).mul_(self._sharpness).softmax(1).to(inner.dtype)  # (B, N, P)
        weighed = (local * weights.unsqueeze(2)).flatten(1, 2)
        return weighed if inner.shape[1] == width else torch.cat([weighed, inner[:, width:]], 1)


def _roots(ups: Tensor) -> Tensor:
    """L^T with L L^T = B^T B, for B (N, C, r)."""
    wide = full(ups)
    grams = wide.mT @ wide
    diagonal = grams.diagonal(dim1=1, dim2=2)
    usual = diagonal.mean(1, keepdim=True)
    # Ranks that are empty, or nearly so, have no root without this.
    diagonal += 1e-7 * usual + torch.finfo(wide.dtype).tiny
    lower: Tensor = torch.linalg.cholesky_ex(grams).L
    return lower.mT * (usual > 0).unsqueeze(2)


def _padded(factor: Tensor, rank: int, dimension: int) -> Tensor:
    """A factor with zeros up to a rank."""
    shape = list(factor.shape)
    shape[dimension] = rank - shape[dimension]
    return torch.cat([factor, factor.new_zeros(shape)], dimension)


class SpreadLoRAs:
    """The same of layers whose factors can be had only by calling them, as when they are offloaded.

    Every u_j is formed. For the arguments see `GatedLoRAs`.
    """

    def __init__(
        self, layer: Any, gate: Gate, names: Sequence[str], scales: Mapping[str, float]
    ) -> None:
        self._layer, self._gate, self._scales = layer, gate, {n: scales[n] for n in names}
        self._channels = -1 if isinstance(layer, Linear) else 2  # of all outputs together

    def __call__(self, x: Tensor) -> Tensor:
        """What is added to the layer's output; see `GatedLoRAs.__call__`."""
        everywhere = self._gate.everywhere
        outputs = {name: self._output(name, x) for name in self._scales}
        local = torch.stack([u for name, u in outputs.items() if name not in everywhere])
        wide = full(local)
        size = wide.square().sum(self._channels, keepdim=True).sqrt()  # (N, B, places)
        usual = size.flatten(2).mean(2).view(*size.shape[:2], *[1] * (size.ndim - 2))
        usual = usual.clamp_min(torch.finfo(size.dtype).tiny)
        weights = (self._gate.sharpness * size / usual).softmax(0).to(local.dtype)
        gained = self._gate.strength * (weights * local).sum(0)
        return sum((u for name, u in outputs.items() if name in everywhere), gained)

    def _output(self, name: str, x: Tensor) -> Tensor:
        """u_j."""
        given = x.to(self._layer.lora_A[name].weight.dtype)
        output: Tensor = self._layer.lora_B[name](self._layer.lora_A[name](given))
        return output * self._scales[name]


def gated(layer: Any, gate: Gate, names: Sequence[str], scales: Mapping[str, float]) -> Forward:
    """A layer's forward under a gate; for the arguments see `GatedLoRAs`.

    A model may be moved between calls, as offloading does just before it is run: what is built of
    the factors follows them.
    """
    base, down = layer.base_layer, layer.lora_A[names[0]]

    def built() -> tuple[torch.device, Forward]:
        place = down.weight.device
        make = SpreadLoRAs if place.type == "meta" else GatedLoRAs
        return place, make(layer, gate, names, scales)

    place, gain = built()

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal place, gain
        result: Tensor = base(x, *args, **kwargs)
        if down.weight.device != place:
            place, gain = built()
        return result + gain(x).to(result.dtype)

    return forward


def decides(gate: Gate, names: Sequence[str]) -> bool:
    """Whether a gate has anything to share out among these LoRAs."""
    return sum(name not in gate.everywhere for name in names) > 1
