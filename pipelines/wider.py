"""Denoisers with layers wider than their configuration can say, in folders of diffusers.

Two models merged with some of their units side by side have feed-forward layers of a width that no
configuration names. The widths are written beside it, under a key that diffusers passes over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn

from cmlora.errors import CmloraError
from cmlora.lora import DENOISERS

_KEY = "cmlora_widths"


def note(models: Mapping[str, nn.Module]) -> None:
    """Write into the configurations of a pipeline's models what the widths of their layers are.

    Text encoders have a setting for it, and stay readable for everyone.

    Args:
        models: denoisers and text encoders by component, from
            `cmlora.adapters.merging.models.merge_models`; their configurations are changed.
    """
    for name, model in models.items():
        known: Any = model
        if name in DENOISERS:
            if widths := _wider(known):
                known.register_to_config(**{_KEY: widths})
            continue
        hidden = {
            layer.out_features
            for path, layer in model.named_modules()
            if path.endswith(".mlp.fc1") and isinstance(layer, nn.Linear)
        }
        if len(hidden) == 1:
            known.config.intermediate_size = hidden.pop()


def opened(folder: Path, dtype: torch.dtype | None) -> dict[str, nn.Module]:
    """The denoisers of a diffusers folder that have wider layers, by component.

    Raises:
        CmloraError: if what stands in the folder is not what `note` and diffusers write.
    """
    found = {}
    for name in DENOISERS:
        config = folder / name / "config.json"
        if config.is_file() and _KEY in (settings := read_config(config)):
            found[name] = _model(folder / name, settings).to(dtype or torch.float32).eval()
    return found


def _wider(model: Any) -> dict[str, list[int]]:
    """Outputs and inputs of the linear layers that its configuration would make otherwise."""
    with torch.device("meta"):
        usual = type(model).from_config(model.config)
    named = dict(model.named_modules())
    return {
        path: [named[path].out_features, named[path].in_features]
        for path, layer in usual.named_modules()
        if isinstance(layer, nn.Linear) and layer.weight.shape != named[path].weight.shape
    }


def read_config(path: Path) -> dict[str, Any]:
    """What a configuration says.

    Raises:
        CmloraError: if it cannot be read.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CmloraError(f"{path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _model(folder: Path, settings: dict[str, Any]) -> nn.Module:
    import diffusers

    from cmlora.adapters.compression.model import put

    found = getattr(diffusers, str(settings.get("_class_name")), None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise CmloraError(f"{folder}: diffusers has no model {settings.get('_class_name')!r}")
    kind: Any = found
    widths = settings.pop(_KEY)
    with torch.device("meta"):
        model = kind.from_config(settings)
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    try:
        for name, (outputs, inputs) in widths.items():
            layer = model.get_submodule(name)
            with torch.device("meta"):
                put(model, name, nn.Linear(inputs, outputs, bias=layer.bias is not None))
        model.load_state_dict(tensors, assign=True)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CmloraError(f"{folder} does not hold the layers it names: {reason}") from None
    model.register_to_config(**{_KEY: widths})
    return cast(nn.Module, model)
