"""Puts a LoRA into a diffusers pipeline through PEFT: completely and verified, or not at all."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cmlora import family, peft_config, rest
from cmlora.errors import CmloraError
from cmlora.listing import listing
from cmlora.lora import DENOISERS, TEXT_ENCODERS, LoRA, Update
from cmlora.rest import Remainder, Shift

MODELS = (*DENOISERS, *TEXT_ENCODERS)
"""Where LoRAs go in a pipeline."""


@dataclass(frozen=True)
class Applied:
    """What `cmlora.files.load` did.

    Args:
        name: the adapter's name in the pipeline.
        modules: how many modules of the denoiser it changes.
        text_modules: how many modules of the text encoders it changes.
        triggers: its trigger words, from the file.
        sha256: of the file; empty for a LoRA that did not come from one.
        category: what it draws, if the file says so.
        skipped: keys and modules that were left out under ``strict=False``.
        config: SHA-256 of the ``adapter_config.json`` beside the file that its strengths come from;
            empty if there is none.
    """

    name: str
    modules: int
    text_modules: int
    triggers: tuple[str, ...] = ()
    sha256: str = ""
    category: str | None = None
    skipped: tuple[str, ...] = ()
    config: str = ""


def insert(
    pipe: Any,
    lora: LoRA,
    name: str,
    *,
    strict: bool = True,
    source: str | None = None,
    remainder: Remainder | None = None,
    strength: float = 1.0,
    further: bool = False,
) -> Applied:
    """Adds a LoRA to the denoiser and the text encoders of a diffusers pipeline.

    Afterwards it is the active adapter of these models, as after diffusers' `load_lora_weights`.
    If anything fails, the pipeline is as it was before.

    Args:
        pipe: any diffusers pipeline with the denoisers and text encoders that the LoRA names.
        lora: the updates.
        name: of the new adapter.
        strict: modules that the pipeline does not have are an error, and so is a header that names
            another family; otherwise a warning.
        source: how messages call the LoRA; its name by default.
        remainder: what the file changes beside the LoRA's low-rank updates.
        strength: multiplies all of it.
        further: the pipeline may have a LoRA of this name already, in models that this one leaves
            alone; both are then one LoRA.

    Raises:
        CmloraError: if the name is taken or impossible, if the LoRA is for another family, if a
            module is missing or has another shape, or if the model does not end up with exactly
            these updates.
    """
    source = source or lora.name
    made_for = remainder.family if remainder is not None else family.of_lora(lora)
    targets = [target for target, _ in remainder.changes] if remainder is not None else []
    touched = [*lora.updates, *(module for target in targets for module in target.modules)]
    components = {module.partition(".")[0] for module in touched} if further else set(MODELS)
    _check_name(pipe, name, components)
    if strength != 1:
        scaled = {m: replace(u, scale=u.scale * strength) for m, u in lora.updates.items()}
        lora = replace(lora, updates=scaled)
    theirs = family.of_pipe(pipe)
    fitted, missing = _fit(pipe, lora, source, f"is for {made_for} and the pipeline is {theirs}")
    shifts: dict[str, dict[str, Shift]] = {}
    if remainder:
        shifts, absent = rest.resolve(pipe, remainder, source, strength)
        missing += absent
    if missing and (strict or not (fitted or shifts)):
        raise CmloraError(
            f"{source} is for {made_for} and the pipeline is {theirs}: "
            f"{listing(missing)} {'is' if len(missing) == 1 else 'are'} not in the pipeline"
            + (", strict=False leaves them out" if fitted or shifts else "")
        )
    if not fitted and not shifts:
        raise CmloraError(f"{source} contains nothing to apply")
    header = family.contradiction(lora, made_for, theirs)
    if header is not None:
        message = f"{source} is for {family.stated(lora.metadata)} and the pipeline is {theirs}"
        if strict:
            raise CmloraError(
                f"{message}: its header says {header}, although its layers fit; load it into its "
                "own family, or with strict=False if the header is wrong"
            )
        warnings.warn(f"{message}: loaded although its header says {header}", stacklevel=3)
    if missing:
        warnings.warn(f"{source}: {listing(missing)} left out, not in the pipeline", stacklevel=3)
    parts = dict.fromkeys([*fitted, *shifts])
    from cmlora.shift import ShiftLayer

    with _resident(pipe), _all_or_nothing(getattr(pipe, component) for component in parts):
        for component in parts:
            model = rest.plain(getattr(pipe, component))
            updates = fitted.get(component, {})
            if updates:
                _add(model, updates, name)
                _verify(model, updates, name, source)
            if component in shifts:
                rest.add(model, shifts[component], name, source)
            if any(isinstance(m, ShiftLayer) for m in model.modules()):
                # PEFT makes only its own kind of layers switch to what is loaded.
                rest.activate(model, name)
    counts = {c: len({*fitted.get(c, {}), *shifts.get(c, {})}) for c in parts}
    text = sum(count for component, count in counts.items() if component in TEXT_ENCODERS)
    total = sum(counts.values())
    return Applied(
        name, total - text, text, lora.triggers, category=lora.category, skipped=tuple(missing)
    )


def remove(pipe: Any, names: Sequence[str] | None = None) -> None:
    """Takes LoRAs out of a pipeline, also where diffusers has no loader that would do it.

    Args:
        pipe: the pipeline.
        names: which; ``None`` is all.
    """
    from diffusers.loaders.peft import PeftAdapterMixin

    for component in MODELS:
        model = rest.plain(getattr(pipe, component, None))
        held = getattr(model, "peft_config", {})
        going = [name for name in held if names is None or name in names]
        if going and len(going) == len(held):
            PeftAdapterMixin.unload_lora(model)
        elif going:
            PeftAdapterMixin.delete_adapters(model, going)


def _check_name(pipe: Any, name: str, components: set[str]) -> None:
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise CmloraError(f"{name!r} cannot name a LoRA; use letters, digits, - and _")
    for component in sorted(components):
        if name in getattr(rest.plain(getattr(pipe, component, None)), "peft_config", {}):
            raise CmloraError(
                f"the pipeline already has a LoRA called {name!r} in its {component}; "
                f"choose another name or call pipe.delete_adapters({name!r})"
            )


def _fit(
    pipe: Any, lora: LoRA, source: str, families: str
) -> tuple[dict[str, dict[str, tuple[nn.Module, Update]]], list[str]]:
    """For every component the model's own module names with layer and update; what is missing."""
    fitted: dict[str, dict[str, tuple[nn.Module, Update]]] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for component, updates in lora.parts.items():
        model = rest.plain(getattr(pipe, component, None))
        for name, update in updates.items():
            layer, own = rest.find(model, component, name)
            if layer is None:
                missing.append(f"{component}.{name}")
                continue
            shape = rest.shape_of(layer)
            update = update.folded()
            if shape is not None and _columns(shape) == _columns(update.shape):
                update = replace(update, down=update.down.reshape(update.rank, *shape[1:]))
            if update.shape != shape:
                found = "no linear or convolution layer" if shape is None else str(shape)
                hint = _control(name, shape, update)
                wrong.append(
                    f"{component}.{name} is {update.shape} in the file and {found} in the pipeline"
                    + hint
                )
                continue
            fitted.setdefault(component, {})[own] = (layer, update)
    if wrong:
        # The width of the text is what tells families apart.
        wrong.sort(key=lambda line: "attn2.to_k" not in line)
        others = [line.partition(" is ")[0] for line in wrong[1:]]
        more = f" and {len(others)} more" if others else ""
        if fitted and others:
            more = f"; so {'is' if len(others) == 1 else 'are'} {listing(others)}"
        if fitted and missing:
            more += f"; {listing(missing)} {'is' if len(missing) == 1 else 'are'} not there"
        raise CmloraError(f"{source} {families}: {wrong[0]}{more}")
    return fitted, missing


def _control(name: str, shape: tuple[int, ...] | None, update: Update) -> str:
    """What to do about a control LoRA, which takes the latents of a second picture as well."""
    if name != "x_embedder" or shape is None or update.shape[1] <= shape[1]:
        return ""
    return "; it is a control LoRA, for a FluxControlPipeline with that many input channels"


def _columns(shape: tuple[int, ...]) -> int:
    """Entries per output; some trainers flatten the kernels of convolutions."""
    return math.prod(shape[1:])


def _tensors(layer: nn.Module, update: Update) -> tuple[Tensor, Tensor]:
    """PEFT's A and B for one layer, where and in the precision the layer computes."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    if dtype.itemsize < 2:
        dtype = torch.bfloat16
    device = "cpu" if weight.is_meta else weight.device
    up = update.up.reshape(*update.up.shape, *[1] * (update.down.ndim - 2))
    down = update.down.to(device, dtype, copy=True)
    return down.contiguous(), up.to(device, dtype, copy=True).contiguous()


def _add(model: Any, updates: Mapping[str, tuple[nn.Module, Update]], name: str) -> None:
    """Injects the layers and sets their weights, as diffusers does for a denoiser.

    Text encoders go the same way: transformers' own `load_adapter` draws random numbers for weights
    that it then keeps, and reports the whole model as missing from the file.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    state: dict[str, Tensor] = {}
    for module, (layer, update) in updates.items():
        down, up = _tensors(layer, update)
        state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"] = down, up
    settings = peft_config.config({m: update for m, (_, update) in updates.items()})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        # Empty layers first: initial values would be drawn from the global random generator.
        options = {"adapter_name": name, "low_cpu_mem_usage": True}
        inject_adapter_in_model(LoraConfig(**settings), model, state_dict=state, **options)
        set_peft_model_state_dict(model, state, **options)
    model._hf_peft_config_loaded = True


def _verify(
    model: Any, updates: Mapping[str, tuple[nn.Module, Update]], name: str, source: str
) -> None:
    """Raises unless the model holds exactly these factors and scales under this name."""
    holders = [m for m in model.modules() if name in getattr(m, "lora_A", ())]
    if len(holders) != len(updates):
        raise CmloraError(f"{source}: {len(holders)} modules were changed, not {len(updates)}")
    for module, (layer, update) in updates.items():
        tuner = model.get_submodule(module)
        down, up = _tensors(layer, update)
        factors = tuner.lora_A[name].weight, tuner.lora_B[name].weight
        alpha = peft_config.alpha(update.scale, update.rank)
        if not (
            torch.equal(factors[0].to(down), down)
            and torch.equal(factors[1].to(up), up)
            and tuner.scaling[name] == alpha / update.rank
        ):
            raise CmloraError(f"{source}: {module} did not arrive in the pipeline as it is stored")


@contextmanager
def _resident(pipe: Any) -> Iterator[None]:
    """Suspends CPU offloading, whose hooks would not know the new layers."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    suspend = getattr(pipe, "_optionally_disable_offloading", lambda _: (False, False, False))
    whole, sequential, grouped = suspend(pipe)
    try:
        yield
    finally:
        if whole:
            pipe.enable_model_cpu_offload()
        elif sequential:
            pipe.enable_sequential_cpu_offload()
        elif grouped:
            for component in pipe.components.values():
                if isinstance(component, nn.Module):
                    _maybe_remove_and_reapply_group_offloading(component)


_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def _all_or_nothing(models: Iterator[Any]) -> Iterator[None]:
    """Puts the models back as they were if the body fails, interrupts included.

    What PEFT changes is all in the attributes of modules. Containers are restored in place, because
    the handles of registered hooks point at them.
    """
    memory: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
    trainable: list[tuple[nn.Parameter, bool]] = []
    for model in models:
        for module in model.modules():
            attributes = vars(module)
            held = {k: v.copy() for k, v in attributes.items() if type(v) in _CONTAINERS}
            memory.append((attributes, dict(attributes), held))
        trainable += [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for attributes, before, held in memory:
            attributes.clear()
            attributes.update(before)
            for key, value in held.items():
                container = before[key]
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(value)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        raise
