"""A LoRA file that was opened: its keys sorted, its tensors read, nothing applied yet."""

from __future__ import annotations

import json
import math
import os
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmlora import container, family, forms, fused, keys, peft_config, rest
from cmlora.errors import CmloraError
from cmlora.forms import Change, Parts, joined
from cmlora.listing import listing
from cmlora.lora import DENOISERS, LoRA, Update, dense
from cmlora.originals import Target
from cmlora.rest import Remainder

PathLike = str | os.PathLike[str]

_STRUCTURE = ("format", "lora_adapter_metadata", "cmlora.scales", "cmlora.triggers", "cmlora.name")


@dataclass(frozen=True)
class Source:
    """A LoRA file that was opened.

    Args:
        path: of the file.
        header: what it says about itself.
        layout: its keys, sorted.
        lora: its low-rank updates.
        whole: whole matrices by module, which no model is needed for.
        known: the layers of the file that these make up.
        remainder: everything that is not in `lora`, for a model.
        sha256: of the file; empty if its tensors were not read.
        alphas: the stored alphas by layer.
        dtypes: the precision of each layer's first tensor.
        config: SHA-256 of the ``adapter_config.json`` beside it that its strengths come from; empty
            if there is none.
    """

    path: PathLike
    header: container.Header
    layout: keys.Layout
    lora: LoRA
    whole: Mapping[str, Tensor]
    known: frozenset[str]
    remainder: Remainder
    sha256: str
    alphas: Mapping[str, float]
    dtypes: Mapping[str, str]
    config: str = ""

    def plain(self) -> tuple[LoRA, dict[str, str]]:
        """The file without a model: whole matrices are updates, and what needs a model is left."""
        left: dict[str, str] = {}
        for (target, change), key in zip(self.remainder.changes, self.remainder.keys, strict=True):
            if change.bias is not None or target.name not in self.known:
                titles = " and ".join(forms.titles(self.layout.modules[target.name]))
                why = "it depends on the model" if change.weight is not None else "no matrix alone"
                left[key] = f"{titles}: {why}; cmlora.files.load and cmlora convert take it"
        updates = {module: dense(matrix) for module, matrix in self.matrices().items()}
        return replace(self.lora, updates={**self.lora.updates, **updates}), left

    def matrices(self) -> dict[str, Tensor]:
        """The whole matrices, with the low-rank updates of the same modules in them."""
        found = self.lora.updates
        return {module: joined(found.get(module), own) for module, own in self.whole.items()}

    def settle(self, strict: bool, left: Mapping[str, str] | None = None) -> None:
        """Raises if something was left over, or warns."""
        if not self.layout.modules:
            examples = listing(self.header.shapes, 3)
            reasons = sorted(set(self.layout.leftover.values()) - {"unknown name"})
            holds = f"{', '.join(reasons)}: {examples}" if reasons else examples or "no tensors"
            raise CmloraError(f"{self.path} holds no LoRA; it holds {holds}")
        found = {**self.layout.leftover, **(left or {})}
        if not found:
            return
        by_reason: dict[str, list[str]] = {}
        for key, reason in sorted(found.items()):
            by_reason.setdefault(reason, []).append(" ".join(key.split()))
        said = "; ".join(f"{listing(names)} ({reason})" for reason, names in by_reason.items())
        message = f"{self.path}: {len(found)} of {len(self.header.shapes)} keys left over: {said}"
        some = len(left or {}) < len(self.layout.modules)
        if strict or not some:
            raise CmloraError(message + ("; strict=False leaves them out" if some else ""))
        warnings.warn(message, stacklevel=4)


def open_file(path: PathLike, pipe: Any = None, *, layers_per_block: int = 2) -> Source:
    """Opens a file and sorts what is in it; nothing is refused yet but damage.

    Args:
        path: a safetensors file.
        pipe: the pipeline it is meant for, whose module names help to understand it.
        layers_per_block: of the UNet, unless there is a pipeline.

    Raises:
        CmloraError: if the file is missing, not safetensors or damaged.
    """
    header = container.header(path)
    unet = getattr(pipe, "unet", None)
    layers = getattr(getattr(unet, "config", None), "layers_per_block", layers_per_block)
    models = (getattr(pipe, name, None) for name in DENOISERS)
    denoiser = rest.plain(next((model for model in models if model is not None), None))
    names = [name for name, _ in denoiser.named_modules()] if denoiser is not None else []
    layout = keys.layout(
        header.shapes, layers if isinstance(layers, int) else 2, header.shapes, names
    )
    configs, folder, configured = _configs(path, header, layout)
    exact = _json(header.metadata, "cmlora.scales", dict, path) or {}
    # A whole checkpoint of gigabytes is not read only to be refused.
    tensors, digest = container.content(path) if layout.modules else ({}, "")
    updates: dict[str, Update] = {}
    whole: dict[str, Tensor] = {}
    changes: list[tuple[Target, Change]] = []
    firsts: list[str] = []
    known: set[str] = set()
    taken: dict[str, str] = {}
    widths: dict[str, int] = {}
    alphas: dict[str, float] = {}
    dtypes: dict[str, str] = {}
    for module, roles in layout.modules.items():
        beside = ("alpha", *forms.DECOMPOSED)
        key = roles.get("down") or min(k for role, k in roles.items() if role not in beside)
        target = layout.targets[module]
        component, _, name = target.modules[0].partition(".")
        config = configs.get(component) or configs.get("") or {}
        try:
            held = {role: tensors[k] for role, k in roles.items()}
            for each in target.modules:
                if each in taken:
                    raise ValueError(f"a second change of {each}, beside {taken[each]}")
                taken[each] = key
            shapes = {role: header.shapes[k] for role, k in roles.items()}
            widths[target.modules[0]] = forms.inputs(shapes) or 0
            called = [name, name.removeprefix("text_model.")]
            if folder:
                called = [peft_config.module_of(key)]
            parts = _parts(held, config, called, exact.get(module))
            dtypes[module] = str(tensors[key].dtype).removeprefix("torch.")
            if parts.alpha is not None:
                alphas[module] = parts.alpha
            change = forms.read(parts)
            _check(change)
            if change.update is not None and change.weight is None:
                down = _kernel(change.update.down, target)
                updates |= fused.share(replace(change.update, down=down), target)
                change = replace(change, update=None)
            if change.dense is not None and change.weight is None:
                matrices = _split(change.dense, target)
                whole |= matrices
                known |= {module} if matrices else set()
            if change.dense is not None or change.weight is not None or change.bias is not None:
                changes.append((target, change))
                firsts.append(key)
        except (ValueError, TypeError, RuntimeError, IndexError, ArithmeticError) as error:
            raise CmloraError(f"{path}: {key}: {' '.join(str(error).split())}") from None
    metadata = {k: v for k, v in header.metadata.items() if k not in _STRUCTURE}
    title = header.metadata.get("cmlora.name") or Path(path).stem
    lora = LoRA(title, updates, metadata, trigger_words(header.metadata, path))
    found = family.of_lora(lora, layout.table, widths)
    remainder = Remainder(tuple(changes), tuple(firsts), found)
    return Source(
        path=path,
        header=header,
        layout=layout,
        lora=lora,
        whole=whole,
        known=frozenset(known),
        remainder=remainder,
        sha256=digest,
        alphas=alphas,
        dtypes=dtypes,
        config=configured,
    )


def config_of(path: PathLike) -> str:
    """SHA-256 of the configuration beside a file that decides its strengths; empty if none does.

    Only headers are read.

    Raises:
        CmloraError: if the file or its configuration is damaged.
    """
    header = container.header(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _configs(path, header, keys.layout(header.shapes, 2, header.shapes, []))[2]


def _configs(
    path: PathLike, header: container.Header, layout: keys.Layout
) -> tuple[Mapping[str, Mapping[str, Any]], bool, str]:
    """What is stated of the strengths, by component, whether in PEFT's own folder, and its hash."""
    stated = header.metadata.get("lora_adapter_metadata")
    complete = all("alpha" in roles for roles in layout.modules.values())
    if stated is not None or complete or not peft_config.of_folder(path, header.shapes):
        return peft_config.scales(stated, str(path)), False, ""
    downs = [header.shapes[roles["down"]] for roles in layout.modules.values() if "down" in roles]
    settings, digest, reason = peft_config.beside(path, [shape[0] for shape in downs if shape])
    if reason:
        warnings.warn(
            f"{path}: its strength is not known and taken as 1: {reason}; put the "
            f"{peft_config.BESIDE} that it came with beside it",
            stacklevel=4,
        )
    return {"": settings}, True, digest


def _parts(
    held: Mapping[str, Tensor], config: Mapping[str, Any], names: Sequence[str], exact: Any
) -> Parts:
    """The tensors of a layer, as its configuration may call it, and what decides its strength."""
    for role, tensor in held.items():
        if not tensor.numel():
            raise ValueError(f"{role} is empty")
    alpha = _alpha(held["alpha"]) if "alpha" in held else None

    def ratio(rank: int) -> float:
        if not rank:
            raise ValueError("its rank is zero, its factors are empty")
        if exact is not None:
            found = _stated(exact)
        elif alpha is not None:
            # Trainers that store 0 mean "no alpha", which is the rank.
            found = (alpha or float(rank)) / rank
        else:
            found = peft_config.scale(config, names, rank)
        if not math.isfinite(found):
            raise ValueError(f"its strength is {found}")
        return found

    settings = dict(config)
    if str(config.get("peft_type", "")).upper() == "LOKR":
        settings["r"] = peft_config.rank_of(config, names)
    feedforward = config.get("feedforward_modules")
    if isinstance(feedforward, list):
        settings["feedforward"] = any(
            name == str(each) or name.endswith(f".{each}") for each in feedforward for name in names
        )
    return Parts(held, settings, ratio, alpha)


def _stated(value: Any) -> float:
    """A strength of ``cmlora.scales``."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"cmlora.scales in the header says {reprlib.repr(value)}, not a number that can be "
            "used; write or download the file again"
        ) from None


def _check(change: Change) -> None:
    """Raises if there is nothing in a change, or its parts are of different layers."""
    update, whole = change.update, change.dense
    empty = whole is not None and not whole.numel()
    if empty or (update is not None and not all(update.shape)):
        raise ValueError("its tensors are empty")
    if update is not None and whole is not None:
        sizes = update.shape[0], math.prod(update.shape[1:])
        if whole.ndim < 2 or sizes != tuple(whole.flatten(1).shape):
            raise ValueError(f"its LoRA is {update.shape} and its difference {tuple(whole.shape)}")


def _kernel(tensor: Tensor, target: Target) -> Tensor:
    """Rows (any, I * 9) of a UNet's convolution with their kernel, which some trainers flatten."""
    first, last = target.modules[0], target.modules[0].rpartition(".")[2]
    if not first.startswith("unet.") or tensor.ndim != 2 or tensor.shape[1] % 9:
        return tensor
    if last not in ("conv", "conv1", "conv2", "conv_in", "conv_out"):
        return tensor
    return tensor.reshape(len(tensor), -1, 3, 3)


def _split(delta: Tensor, target: Target) -> dict[str, Tensor]:
    """A whole matrix as those of its modules; none if it is no matrix, or only a model tells."""
    if delta.ndim not in (2, 4):
        return {}
    try:
        widths = fused.sizes(target, *delta.shape[:2])
    except ValueError:
        return {}
    rows = fused.swapped(delta, target, delta.shape[1])
    split = (_kernel(part, target) for part in torch.split(rows, widths))
    return dict(zip(target.modules, split, strict=True))


def _alpha(tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"alpha has {tensor.numel()} values instead of one")
    return float(tensor.item())


def trigger_words(metadata: Mapping[str, str], path: PathLike) -> tuple[str, ...]:
    """The trigger words that a header names."""
    own = _json(metadata, "cmlora.triggers", list, path)
    if own is not None:
        return tuple(str(word) for word in own)
    phrases = metadata.get("modelspec.trigger_phrase", "").split(",")
    return tuple(phrase.strip() for phrase in phrases if phrase.strip())


def _json(metadata: Mapping[str, str], key: str, kind: type, path: PathLike) -> Any:
    """A JSON value of the header, or ``None``; a wrong one is the file's defect."""
    if key not in metadata:
        return None
    try:
        value = json.loads(metadata[key])
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise CmloraError(f"{path}: {key} in the header is not a JSON {kind.__name__}")
    return value
