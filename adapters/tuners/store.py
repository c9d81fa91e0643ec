"""Adapters of any tuner as safetensors files that carry their own settings."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import safetensors
import torch
from peft import inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from cmlora import container, peft_config
from cmlora.adapters.tuners.tensors import generator
from cmlora.errors import CmloraError
from cmlora.lora import DENOISERS, TEXT_ENCODERS

PathLike = str | os.PathLike[str]

_SETTINGS, _RANDOM = "lora_adapter_metadata", "cmlora.random"


def save(
    target: Any,
    name: str,
    path: PathLike,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes one adapter, with its settings in the header; the file appears whole or not at all.

    Args:
        target: a model, or a pipeline: then all its adapted parts go into the file.
        name: of the adapter.
        path: of the file, ending in ``.safetensors``.
        metadata: more strings for the header.
        dtype: of the floating point tensors; as they are if not given.

    Raises:
        CmloraError: if there is no such adapter.
    """
    if not str(path).endswith(".safetensors"):
        raise CmloraError(f"{path} should end in .safetensors, which is what is written")
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for part, model in _parts(target).items():
        config = getattr(model, "peft_config", {}).get(name)
        if config is None:
            continue
        front = f"{part}." if part else ""
        state = get_peft_model_state_dict(model, adapter_name=name)
        for key, tensor in state.items():
            cast = dtype if tensor.is_floating_point() else None
            tensors[front + key] = tensor.to("cpu", cast)
        settings |= {front + key: value for key, value in _told(config).items()}
    if not tensors:
        raise CmloraError(f"there is no adapter {name!r} to write to {path}")
    header = {
        "cmlora.name": name,
        **(metadata or {}),
        "format": "pt",
        _SETTINGS: json.dumps(settings, sort_keys=True),
        _RANDOM: _fingerprint(),
    }
    container.save(path, tensors, header)


def load(target: Any, path: PathLike, name: str) -> tuple[str, ...]:
    """Reads an adapter of any tuner into a model or pipeline, or leaves it as it is.

    Args:
        target: a model, or a pipeline.
        path: a file made by `save`, or by diffusers' ``save_lora_adapter``.
        name: of the adapter in the model.

    Returns:
        The parts of the pipeline that were adapted.

    Raises:
        CmloraError: if the file does not say what it is, or does not fit.
    """
    tables, states = read(path)
    models = _parts(target)
    lone = next(iter(states)) if len(states) == 1 else None
    if lone == "" or (lone is not None and len(models) == 1):
        part = next((p for p in DENOISERS if p in models), next(iter(models)))
        states, tables = {part: states[lone]}, {part: tables[lone]}
    missing = sorted(states.keys() - models.keys())
    if missing:
        raise CmloraError(f"{path} is for {', '.join(missing)}, which is not in the pipeline")
    done: list[str] = []
    try:
        for part, state in states.items():
            if name in getattr(models[part], "peft_config", {}):
                raise CmloraError(f"there is an adapter {name!r} already")
            done.append(part)
            _insert(models[part], tables[part], state, name, str(path))
    except BaseException:
        for part in done:
            remove(models[part], name)
        raise
    return tuple(part for part in models if part in states)


def read(path: PathLike) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """Settings and tensors of a file by part of the pipeline; the part of a lone model is "".

    Raises:
        CmloraError: if the file cannot be read or does not say which tuner it is of.
    """
    header = container.header(path)
    try:
        settings = json.loads(header.metadata[_SETTINGS])
        tables: dict[str, dict[str, Any]] = {}
        for key, value in settings.items():
            part, _, option = key.rpartition(".")
            tables.setdefault(part, {})[option] = value
        kinds = {part: table["peft_type"] for part, table in tables.items()}
    except (KeyError, ValueError, AttributeError):
        raise CmloraError(f"{path} does not say in its header which tuner it is of") from None
    unknown = sorted(str(k) for k in kinds.values() if k not in PEFT_TYPE_TO_CONFIG_MAPPING)
    if unknown or not tables:
        raise CmloraError(f"{path} is of an unknown tuner: {', '.join(unknown) or 'none'}")
    if header.metadata.get(_RANDOM, _fingerprint()) != _fingerprint():
        raise CmloraError(f"{path} was made where random numbers differ; it cannot be restored")
    try:
        tensors = load_file(path)
    except safetensors.SafetensorError as error:
        raise CmloraError(f"{path} is damaged: {error}; copy or download it again") from None
    states: dict[str, dict[str, Tensor]] = {part: {} for part in tables}
    for key, tensor in tensors.items():
        part = next((p for p in tables if p and key.startswith(f"{p}.")), "")
        if part not in states:
            raise CmloraError(f"{path}: {key} belongs to no part that the header names")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise CmloraError(f"{path}: {key} holds NaN or infinity; the training diverged")
        states[part][key.removeprefix(f"{part}.") if part else key] = tensor
    return tables, states


def config_of(table: Mapping[str, Any]) -> Any:
    """The settings of a file as the object they were saved from."""
    known = PEFT_TYPE_TO_CONFIG_MAPPING[table["peft_type"]]
    names = set(known.__dataclass_fields__) - {"peft_type"}
    try:
        return known(**{key: value for key, value in table.items() if key in names})
    except (TypeError, ValueError) as error:
        raise CmloraError(f"settings of the adapter are damaged: {error}") from None


def remove(model: nn.Module, name: str) -> None:
    """Takes an adapter out of a model; a layer that has no other becomes what it was."""
    for key, layer in list(model.named_modules()):
        if not isinstance(layer, BaseTunerLayer) or name not in layer._get_available_adapters():
            continue
        layer.unmerge() if layer.merged else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that another adapter becomes the active one
            layer.delete_adapter(name)
        if not layer._get_available_adapters():
            parent, _, child = key.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    configs = getattr(model, "peft_config", {})
    configs.pop(name, None)
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config
        model._hf_peft_config_loaded = False  # type: ignore[assignment]


def _insert(
    model: nn.Module, table: Mapping[str, Any], state: dict[str, Tensor], name: str, where: str
) -> None:
    config = config_of(table)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    modules = {key.rsplit(f".{prefix}", 1)[0] for key in state}
    # Patterns of a stranger's file could run for hours; the tensors name the layers anyway.
    config.target_modules, config.exclude_modules = set(modules), None
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, option, None)
        if patterns:
            try:
                setattr(config, option, peft_config.settled(patterns, modules))
            except CmloraError as error:
                raise CmloraError(f"{where}: {option}: {error}; one could run for hours") from None
    absent = sorted(modules - {key for key, _ in model.named_modules()})
    if absent:
        raise CmloraError(f"{where} is for layers that are not in the model: {absent[0]}, ...")
    state = {key: tensor.clone() for key, tensor in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, model, name, state_dict=state)
        wanted = {
            k: v.shape for k, v in get_peft_model_state_dict(model, adapter_name=name).items()
        }
        for key, shape in wanted.items():
            if key not in state or state[key].shape != shape:
                found = tuple(state[key].shape) if key in state else "missing"
                raise CmloraError(f"{where}: {key} is {found}, the model needs {tuple(shape)}")
        set_peft_model_state_dict(model, state, name)
    model._hf_peft_config_loaded = True  # type: ignore[assignment]
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(name)


def _parts(target: Any) -> dict[str, nn.Module]:
    if isinstance(target, nn.Module):
        return {"": target}
    found = {part: getattr(target, part, None) for part in (*DENOISERS, *TEXT_ENCODERS)}
    return {part: model for part, model in found.items() if isinstance(model, nn.Module)}


def _told(config: Any) -> dict[str, Any]:
    """The settings a file needs: PEFT's defaults are left out, as its versions know other names."""
    told = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    if not type(config).__module__.startswith("peft."):
        return told
    usual = type(config)().to_dict()
    needed = ("peft_type", "r", "lora_alpha", "target_modules")
    return {k: v for k, v in told.items() if k in needed or v != usual.get(k)}


def _fingerprint() -> str:
    """Changes if the random numbers that frozen tensors are drawn from do."""
    numbers = torch.rand(4, generator=generator(0)).tolist()
    return " ".join(f"{number:.6f}" for number in numbers)
