"""Weights with LoRAs added: computed once per combination, then exchanged instead of recomputed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from torch import Tensor, nn

from cmlora.errors import CmloraError

_OFFLOADING = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")


def resident(module: nn.Module) -> bool:
    """Whether nothing else moves a model's weights about, as offloading does."""
    for attributes in map(vars, module.modules()):
        hook = attributes.get("_diffusers_hook")
        if "_hf_hook" in attributes or (hook and any(name in hook.hooks for name in _OFFLOADING)):
            return False
    return True


def check_resident(module: nn.Module) -> None:
    """See that nothing else moves a model's weights about.

    Raises:
        CmloraError: if offloading is on, which exchanges the weights by itself.
    """
    if not resident(module):
        raise CmloraError(
            "execution='fused' keeps weights of its own for every LoRA, and offloading moves them "
            "away; use execution='sequential', or leave the model on its device"
        )


class FusedWeight:
    """The weight of one layer under LoRAs, which takes the weight's place while they act.

    With N LoRAs that act one at a time there are N copies of the weights they adapt, for passes
    that cost what a pass of the base model costs. Sums are formed in fp32 (or wider).

    Args:
        layer: PEFT's LoRA around a linear layer or convolution, for which `fusable` holds.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._parameter: nn.Parameter = layer.base_layer.weight
        self._original: Tensor = self._parameter.data
        self._present = self._original

    def under(self, scales: Mapping[str, float]) -> Tensor:
        """W + sum_i s_i B_i A_i; W itself, not a copy, for none.

        Args:
            scales: of the LoRAs that act, alpha and rank included.
        """
        if not scales:
            return self._original
        wide = torch.promote_types(self._original.dtype, torch.float32)
        total = self._original.to(wide).flatten(1)
        for name, scale in scales.items():
            down = self._layer.lora_A[name].weight.data.to(wide).flatten(1)
            up = self._layer.lora_B[name].weight.data.to(wide).flatten(1)
            if total.data_ptr() == self._original.data_ptr():
                total = torch.addmm(total, up, down, alpha=scale)
            else:
                total.addmm_(up, down, alpha=scale)
        fused: Tensor = total.to(self._original.dtype).view(self._original.shape)
        if fused.stride() == self._original.stride():
            return fused
        return torch.empty_like(self._original).copy_(fused)

    def put(self, weight: Tensor) -> None:
        """Let the layer compute with this.

        Raises:
            CmloraError: if somebody else has exchanged the weight, as moving the model does.
        """
        if self._moved():
            raise CmloraError(
                "the model's weights were moved while LoRAs are fused into them; move the model "
                "before composing, or use execution='sequential'"
            )
        self._parameter.data = self._present = weight

    def restore(self) -> None:
        """Put the original back, the very same memory; or its values where the model is now."""
        if self._moved():
            self._original = self._original.to(self._parameter)
        self._parameter.data = self._present = self._original

    def _moved(self) -> bool:
        """Whether somebody else has exchanged the weight since."""
        return bool(self._parameter.data_ptr() != self._present.data_ptr())


def fusable(layer: Any) -> bool:
    """Whether a layer is a plain LoRA around a plain linear layer or convolution.

    Others (DoRA, other adapters, quantised or grouped layers) are computed beside their layer.
    """
    base = getattr(layer, "base_layer", None)
    if (type(layer), type(base)) not in ((Linear, nn.Linear), (Conv2d, nn.Conv2d)):
        return False
    assert base is not None
    turned = getattr(layer, "fan_in_fan_out", False)
    plain = not (layer.lora_variant or any(layer.lora_bias.values()) or turned)
    return plain and base.weight.is_floating_point() and getattr(base, "groups", 1) == 1


def copied(module: nn.Module) -> int:
    """Bytes of one copy of all weights that LoRAs of a model can be fused into."""
    layers: list[Any] = [layer for layer in module.modules() if fusable(layer)]
    weights: list[Tensor] = [layer.base_layer.weight for layer in layers]
    return sum(weight.numel() * weight.element_size() for weight in weights)
