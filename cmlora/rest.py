"""What files change beside low-rank updates: worked out with the model's weights, put into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cmlora import family, fused
from cmlora.errors import CmloraError
from cmlora.forms import Change
from cmlora.lora import TEXT_ENCODERS
from cmlora.originals import Target


@dataclass(frozen=True)
class Remainder:
    """The changes of a file that are no low-rank updates.

    Args:
        changes: with the place of each layer.
        keys: one key of each layer, for messages.
        family: of base models that the file is for.
    """

    changes: tuple[tuple[Target, Change], ...] = ()
    keys: tuple[str, ...] = ()
    family: str = ""

    def __bool__(self) -> bool:
        return bool(self.changes)


class Shift(NamedTuple):
    """What is added to a layer's parameters, shaped like them, in float32."""

    weight: Tensor | None
    bias: Tensor | None


def resolve(
    pipe: Any, remainder: Remainder, source: str, strength: float = 1.0
) -> tuple[dict[str, dict[str, Shift]], list[str]]:
    """The shifts by component and the model's own module name, and the names that are missing.

    Args:
        pipe: the pipeline.
        remainder: the changes of a file.
        source: how messages call the file.
        strength: multiplies the shifts.

    Raises:
        CmloraError: if a layer does not fit, or its weights are quantized and needed.
    """
    found: dict[str, dict[str, Shift]] = {}
    missing: list[str] = []
    for (target, change), key in zip(remainder.changes, remainder.keys, strict=True):
        layers: dict[tuple[str, str], nn.Module] = {}
        for module in target.modules:
            component, _, name = module.partition(".")
            layer, own = find(plain(getattr(pipe, component, None)), component, name)
            if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
                missing.append(module)
            else:
                layers[component, own] = layer
        if len(layers) < len(target.modules):
            continue
        try:
            shifts = _shifts(target, change, list(layers.values()))
        except (ValueError, RuntimeError, IndexError, TypeError, ArithmeticError) as error:
            raise CmloraError(
                f"{source} is for {remainder.family} and the pipeline is {family.of_pipe(pipe)}: "
                f"{key}: {_line(error)}"
            ) from None
        for (component, own), shift in zip(layers, shifts, strict=True):
            if not all(t is None or bool(torch.isfinite(t).all()) for t in shift):
                raise CmloraError(f"{source}: {key} gives numbers that are not finite")
            if strength != 1:
                shift = Shift(*(None if t is None else t * strength for t in shift))
            found.setdefault(component, {})[own] = shift
    return found, missing


@torch.no_grad()
def _shifts(target: Target, change: Change, layers: list[nn.Module]) -> list[Shift]:
    """The shifts of the modules that make up one layer of the file."""
    weights = [layer.weight for layer in layers]
    assert all(isinstance(weight, Tensor) for weight in weights)
    tensors = [weight.detach() for weight in weights if isinstance(weight, Tensor)]
    if any(weight.is_meta or not weight.is_floating_point() for weight in tensors):
        if change.base:
            raise ValueError("it depends on the model's weights, which are quantized or elsewhere")
        tensors = [
            torch.zeros(shape_of(layer) or weight.shape)
            for weight, layer in zip(tensors, layers, strict=True)
        ]
    own = torch.cat([weight.to("cpu", torch.float32) for weight in tensors])
    inputs = own.shape[1] if own.ndim > 1 else 0
    delta = change.delta(fused.swapped(own, target, inputs))
    widths = [len(weight) for weight in tensors]
    deltas: list[Tensor | None] = [None] * len(layers)
    if delta is not None:
        deltas = list(torch.split(fused.swapped(delta, target, inputs), widths))
    biases: list[Tensor | None] = [None] * len(layers)
    if change.bias is not None:
        held = [getattr(layer, "bias", None) for layer in layers]
        present = [b.detach().to("cpu", torch.float32) for b in held if isinstance(b, Tensor)]
        whole = torch.cat(present) if len(present) == len(layers) else None
        if whole is not None:
            whole = fused.swapped(whole, target, inputs)
        shift = change.bias(whole).flatten()
        if len(shift) != sum(widths):
            raise ValueError(f"a bias of {len(shift)} for {sum(widths)} outputs")
        if whole is not None or bool(shift.any()):
            biases = list(torch.split(fused.swapped(shift, target, inputs), widths))
    return [Shift(*pair) for pair in zip(deltas, biases, strict=True)]


def add(model: Any, shifts: Mapping[str, Shift], name: str, source: str) -> None:
    """Puts shifts into a model under an adapter's name.

    Raises:
        CmloraError: if a layer cannot take its shift.
    """
    from peft import LoraConfig

    from cmlora.shift import wrap

    for module, shift in shifts.items():
        layer = wrap(model, module)
        try:
            layer.add(name, *(_placed(layer.base_layer, tensor) for tensor in shift))
        except ValueError as error:
            raise CmloraError(f"{source}: {module}: {error}") from None
    if name not in getattr(model, "peft_config", {}):
        # Whatever asks a model for its adapters looks here.
        if not hasattr(model, "peft_config"):
            model.peft_config = {}
        model.peft_config[name] = LoraConfig(r=1, target_modules=sorted(shifts))
    model._hf_peft_config_loaded = True


def activate(model: Any, name: str) -> None:
    """Makes one adapter the active one of all layers, whatever kind they are of."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter([name], inference_mode=True)


def deltas(shifts: Mapping[str, Mapping[str, Shift]]) -> Iterator[tuple[str, Shift]]:
    """The shifts by full module name, as `cmlora.lora.LoRA` has them."""
    for component, found in shifts.items():
        for name, shift in found.items():
            if component in TEXT_ENCODERS and name.startswith(("encoder.layers.", "embeddings.")):
                name = f"text_model.{name}"
            yield f"{component}.{name}", shift


def find(model: Any, component: str, name: str) -> tuple[nn.Module | None, str]:
    """A layer of a model without any adapters around it, and its name there."""
    if component in TEXT_ENCODERS and not hasattr(model, "text_model"):
        name = name.removeprefix("text_model.")
    if model is None:
        return None, name
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        return None, name
    return (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer), name


def plain(model: Any) -> Any:
    """The model itself if it was wrapped by `torch.compile`."""
    return getattr(model, "_orig_mod", model)


def shape_of(layer: nn.Module) -> tuple[int, ...] | None:
    """The shape of a layer's matrix; not from the weight, whose shape changes if quantized."""
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    return None


def _placed(layer: nn.Module, tensor: Tensor | None) -> Tensor | None:
    """A shift where and in the precision the layer computes."""
    if tensor is None:
        return None
    weight = layer.weight
    assert isinstance(weight, Tensor)
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    if dtype.itemsize < 2:
        dtype = torch.bfloat16
    return tensor.to("cpu" if weight.is_meta else weight.device, dtype, copy=True).contiguous()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
