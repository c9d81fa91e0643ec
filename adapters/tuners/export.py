"""Any adapter that is an update of the weight as an ordinary LoRA, which every program reads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.tensors import full
from cmlora.errors import CmloraError
from cmlora.lora import DENOISERS, TEXT_ENCODERS, LoRA, Update

_EXACT = 1e-6


def to_lora(target: Any, name: str, rank: int | None = None) -> tuple[LoRA, float]:
    """The adapter of a model or pipeline, at its present strength, as a LoRA.

    Args:
        target: a pipeline; or a model, whose modules are then named as a UNet's.
        name: of the adapter.
        rank: the largest rank of a layer; ``None`` is as many as an exact copy needs.

    Returns:
        The LoRA, and the norm of what it lacks divided by the norm of the adapter's update.

    Raises:
        CmloraError: if there is no such adapter, or it is more than an update of weights.
    """
    if rank is not None and rank < 1:
        raise CmloraError(f"rank is {rank}, not 1 or more")
    models: dict[str, Any] = {DENOISERS[0]: target}
    if not isinstance(target, nn.Module):
        models = {part: getattr(target, part, None) for part in (*DENOISERS, *TEXT_ENCODERS)}
    updates: dict[str, Update] = {}
    lost = norm = 0.0
    for part, model in models.items():
        found = model.named_modules() if isinstance(model, nn.Module) else ()
        for key, layer in found:
            if not isinstance(layer, BaseTunerLayer):
                continue
            if name not in layer._get_available_adapters():
                continue
            key = key.replace(".base_layer", "")
            if part in TEXT_ENCODERS:
                key = f"text_model.{key.removeprefix('text_model.')}"
            update, missing, size = layer_to_lora(layer, name, rank, f"{part}.{key}")
            updates[f"{part}.{key}"] = update
            lost, norm = lost + missing**2, norm + size**2
    if not updates:
        raise CmloraError(f"there is no adapter {name!r} to export")
    return LoRA(name, updates), math.sqrt(lost / norm) if norm else 0.0


@torch.no_grad()
def layer_to_lora(
    layer: Any, name: str, rank: int | None = None, key: str = "the layer"
) -> tuple[Update, float, float]:
    """One layer's adapter as an update, with the norm of what it lacks and that of the whole."""
    base = layer.get_base_layer()
    if getattr(base, "groups", 1) != 1:
        raise CmloraError(f"{key} is a convolution in groups, for which LoRA files have no form")
    if not _additive(layer, name):
        raise CmloraError(f"{name}: {type(layer).__name__} in {key} is no update of the weight")
    delta = full(layer.get_delta_weight(name)).reshape(base.weight.shape)
    exact = None
    if isinstance(layer, LoraLayer):
        down, up = (getattr(layer, f"lora_{side}")[name].weight.detach() for side in "AB")
        exact = full(up).flatten(1), full(down).flatten(1)
    elif isinstance(layer, TunerLayer):
        shift = layer.bias_update(name)
        if shift is not None and bool(shift.any()):
            raise CmloraError(f"{name} changes the bias of {key}, for which a LoRA has no place")
        exact = layer.factors(name)
    if exact is not None:
        up, down = exact
        whole = Update(down.reshape(-1, *base.weight.shape[1:]), up, layer.scaling[name])
        best = min(up.shape[0], down[0].numel())
        # More ranks than the matrix has would only be dead weight.
        limit = best if rank is None else min(rank, best)
        update = whole if whole.rank <= limit else whole.truncate(limit)
    else:
        update = _decomposed(delta, rank)
    update = replace(update, down=update.down.contiguous(), up=update.up.contiguous())
    return update, float((delta - update.delta()).norm()), float(delta.norm())


def _additive(layer: Any, name: str) -> bool:
    """Whether an adapter is ``W + weight * delta``; PEFT says so of linear layers only."""
    if isinstance(layer, LoraLayer):
        return not layer.use_dora.get(name) and not layer.lora_bias.get(name)
    if isinstance(layer, LycorisLayer):
        return True
    return hasattr(layer, "get_delta_weight") and bool(layer.supports_lora_conversion(name))


def _decomposed(delta: Tensor, rank: int | None) -> Update:
    matrix = delta.double().flatten(1)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    keep = max(1, int((values > _EXACT * values[0]).sum()))
    keep = keep if rank is None else min(rank, keep)
    root = values[:keep].sqrt()
    down = (root[:, None] * right[:keep]).float()
    return Update(down.reshape(keep, *delta.shape[1:]), (left[:, :keep] * root).float())
