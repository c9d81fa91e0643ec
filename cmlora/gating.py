"""LoRAs that share out the places of every layer among them, within a single pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from torch import Tensor

from cmlora.plan import Gate

Forward = Callable[..., Tensor]


def gateable(layer: Any) -> bool:
    """Whether a layer is a plain LoRA around a linear layer or convolution, with no other forward.

    Others (DoRA, other adapters) cannot be taken apart; their LoRAs are added up as usual.
    """
    if type(layer) not in (Linear, Conv2d) or "forward" in vars(layer):
        return False
    return not (layer.lora_variant or any(layer.lora_bias.values()))


def gated(layer: Any, gate: Gate, names: Sequence[str]) -> Forward:
    """A layer's forward under a gate.

    Args:
        layer: for which `gateable` holds; linear (..., C), with places between the batch and the
            channels, or a convolution (B, C, H, W).
        gate: says how the places are shared out.
        names: the LoRAs that act in this layer; their present scales count.
    """
    base, scaling = layer.base_layer, layer.scaling
    down, up = layer.lora_A, layer.lora_B
    common = [name for name in names if name in gate.everywhere]
    local = [name for name in names if name not in gate.everywhere]
    channels = -1 if isinstance(layer, Linear) else 1

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = base(x, *args, **kwargs)
        given = x.to(down[names[0]].weight.dtype)
        updates = {name: up[name](down[name](given)) * scaling[name] for name in names}
        for name in common:
            result = result + updates[name].to(result.dtype)
        share = shared_out(torch.stack([updates[name] for name in local]), gate, channels)
        return result + share.to(result.dtype)

    return forward


def shared_out(updates: Tensor, gate: Gate, channels: int) -> Tensor:
    """s sum_j w_j(x) u_j(x), with w(x) = softmax over j of k |u_j(x)| / mean_x |u_j|.

    A layer without places (of a time embedding) weighs all alike. A single LoRA acts as it is.

    Args:
        updates: of N LoRAs, (N, B, ..., C) or (N, B, C, H, W).
        gate: strength s and sharpness k.
        channels: the dimension of channels in one update.
    """
    if len(updates) == 1:
        return updates[0]
    wide = updates.to(torch.promote_types(updates.dtype, torch.float32))
    dimension = channels if channels < 0 else channels + 1
    size = torch.linalg.vector_norm(wide, dim=dimension, keepdim=True)
    places = [d for d in range(2, size.ndim) if d != dimension % size.ndim]
    usual = size.mean(places, keepdim=True) if places else size
    relative = size / usual.clamp_min(torch.finfo(size.dtype).tiny)
    weights = (gate.sharpness * relative).softmax(0)
    return gate.strength * (weights * wide).sum(0)


def forwards(
    layers: Mapping[int, Any], acting: Mapping[int, Sequence[str]], gate: Gate
) -> list[tuple[int, Forward]]:
    """The forwards of all layers in which a gate has something to decide.

    Args:
        layers: those for which `gateable` holds, by position.
        acting: names of the LoRAs that act, by position.
        gate: of the pass.
    """
    found = []
    for index, layer in layers.items():
        names = acting[index]
        if sum(name not in gate.everywhere for name in names) > 1:
            found.append((index, gated(layer, gate, names)))
    return found
