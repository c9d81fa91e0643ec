"""What the layers of a model are fed, as second moments: all that data-aware methods need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cmlora.adapters.compression.layers import fits

_WIDEST = 2048


def grams(model: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """Second moments ``sum x x^T`` of the inputs of every layer, over whatever ``run`` does.

    Args:
        model: watched while ``run`` is called; the hooks come off whatever happens.
        run: calls the model on typical inputs.

    Returns:
        By module name, (I, I) in float64; (I, g, g) with the kernel's g = kh * kw places for
        convolutions of more than 2048 inputs, whose channels are then taken as unrelated. Layers
        that were not called are missing.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = _rows(layer, arguments[0].detach())
            if isinstance(layer, nn.Conv2d) and rows.shape[1] > _WIDEST:
                parts = rows.reshape(len(rows), layer.in_channels, -1)
                moments = torch.einsum("nig,nih->igh", parts, parts)
            else:
                moments = rows.T @ rows
            found[name] = found[name] + moments.cpu() if name in found else moments.cpu()

        return hook

    handles = [
        layer.register_forward_pre_hook(watch(name))
        for name, layer in model.named_modules()
        if fits(layer)
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """(n, I) in float64: one row for every place the layer's matrix is applied to."""
    if not isinstance(layer, nn.Conv2d):
        return inputs.double().reshape(-1, inputs.shape[-1])
    assert not isinstance(layer.padding, str)
    patches = functional.unfold(
        inputs.double(), layer.kernel_size, layer.dilation, layer.padding, layer.stride
    )
    return patches.transpose(1, 2).flatten(0, 1)
