"""Low-rank updates on a model for the length of a block, through which gradients flow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional

from cmlora.adapters.calibration import base_layers
from cmlora.errors import CmloraError
from cmlora.lora import Update


@contextmanager
def applied(model: nn.Module, updates: Mapping[str, Update]) -> Iterator[None]:
    """Adds updates to the outputs of layers; the weights are not touched.

    Args:
        model: its layers may be compressed, or carry LoRAs of PEFT's, which are looked through.
        updates: by module name within the model; factors may require gradients.

    Raises:
        CmloraError: if the model has no layer of that name, or none of that shape.
    """
    layers = dict(base_layers(model))
    handles = []
    try:
        for name, update in updates.items():
            layer = layers.get(name)
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                raise CmloraError(f"the model has no linear layer or convolution {name}")
            _check(name, layer, update)
            handles.append(layer.register_forward_hook(_adding(update.folded())))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(name: str, layer: nn.Linear | nn.Conv2d, update: Update) -> None:
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (layer.out_features, layer.in_features)
    else:
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    found = (*update.shape, 1, 1)[:4]
    if found != (*shape, 1, 1)[:4]:
        raise CmloraError(f"{name} is {update.shape} in the LoRA and {shape} in the model")


def _adding(update: Update) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        down, up = update.down.to(x), update.up.to(x) * update.scale
        if isinstance(layer, nn.Conv2d):
            kernel = down.reshape(*down.shape[:2], *layer.kernel_size)
            inner = functional.conv2d(
                x, kernel, None, layer.stride, layer.padding, layer.dilation, layer.groups
            )
            return output + functional.conv2d(inner, up[:, :, None, None])
        return output + functional.linear(functional.linear(x, down.flatten(1)), up)

    return hook
