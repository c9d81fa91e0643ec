"""LoRA files: every trainer's safetensors in, diffusers' safetensors out.

Reading is strict: what cannot be read completely is an error that names the keys. Nothing is ever
unpickled.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cmlora import container, family, insert, keys, peft_config
from cmlora.container import sha256 as sha256
from cmlora.errors import CmloraError
from cmlora.insert import Applied as Applied
from cmlora.insert import listing
from cmlora.lora import TEXT_ENCODERS, LoRA, Update

PathLike = str | os.PathLike[str]

_STRUCTURE = ("format", "lora_adapter_metadata", "cmlora.scales", "cmlora.triggers", "cmlora.name")
# Hashes of the tensors of another file.
_STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def read(path: PathLike, *, strict: bool = True, layers_per_block: int = 2) -> LoRA:
    """Reads a LoRA written by any trainer.

    Args:
        path: a safetensors file with the names of diffusers, PEFT or kohya.
        strict: a key that is not understood is an error; otherwise a warning that counts them.
        layers_per_block: of the UNet, for files with LDM block numbers; 2 in every real one.

    Raises:
        CmloraError: if the file is missing, not safetensors, damaged, not a LoRA, or not readable
            completely.
    """
    source = _read(path, layers_per_block)
    source.settle(strict)
    return source.lora


def load(pipe: Any, path: PathLike, name: str, *, strict: bool = True) -> Applied:
    """Reads a LoRA and puts it into a diffusers pipeline, or leaves the pipeline as it is.

    Args:
        pipe: the pipeline; its UNet or transformer and its text encoders are adapted.
        path: see `read`.
        name: of the adapter in the pipeline.
        strict: anything that cannot be applied is an error; otherwise a warning that counts it.

    Raises:
        CmloraError: see `read` and `cmlora.insert.insert`.
    """
    config = getattr(getattr(pipe, "unet", None), "config", None)
    layers = getattr(config, "layers_per_block", 2)
    source = _read(path, layers if isinstance(layers, int) else 2)
    source.settle(strict)
    applied = insert.insert(pipe, source.lora, name, strict=strict, source=str(path))
    skipped = (*sorted(source.layout.leftover), *applied.skipped)
    return replace(applied, sha256=source.sha256, skipped=skipped)


def write(lora: LoRA, path: PathLike) -> None:
    """Writes a LoRA as diffusers does; ``pipe.load_lora_weights`` of any diffusers reads it.

    Reading it again gives the same tensors, scales, name, triggers and metadata. A Tucker core,
    for which diffusers has no name, is multiplied into ``down``. The file appears whole or not at
    all.

    Raises:
        CmloraError: if there is nothing to write, the name does not end in ``.safetensors``, or
            the place cannot be written to.
    """
    if Path(path).suffix != ".safetensors":
        raise CmloraError(f"{path} should end in .safetensors, which is what is written")
    if not lora.updates:
        raise CmloraError(f"{lora.name} has no updates to write to {path}")
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    inexact: dict[str, float] = {}
    for component, updates in lora.parts.items():
        text = component in TEXT_ENCODERS
        folded = {name: update.folded() for name, update in updates.items()}
        for name, update in folded.items():
            key = f"{component}.{name}"
            tensors[f"{key}.lora_A.weight"] = update.down
            ones = [1] * (update.down.ndim - 2)
            tensors[f"{key}.lora_B.weight"] = update.up.reshape(*update.up.shape, *ones)
            if peft_config.alpha(update.scale, update.rank) / update.rank != update.scale:
                inexact[key] = update.scale
        # Whether a text encoder's modules start with text_model. depends on transformers' version.
        named = {n.removeprefix("text_model.") if text else n: u for n, u in folded.items()}
        table = peft_config.config(named, anchored=not text)
        settings |= {f"{component}.{option}": value for option, value in table.items()}
    metadata = {key: value for key, value in lora.metadata.items() if key not in _STALE}
    metadata |= {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(settings, sort_keys=True),
        "cmlora.name": lora.name,
        "cmlora.triggers": json.dumps(lora.triggers),
    }
    if inexact:
        metadata["cmlora.scales"] = json.dumps(inexact)
    container.save(path, tensors, metadata)


def triggers(path: PathLike) -> tuple[str, ...]:
    """The trigger words that a LoRA file names; reads only its header."""
    return _triggers(container.header(path).metadata, path)


def describe(path: PathLike) -> dict[str, Any]:
    """Everything worth knowing about a LoRA file, as JSON types; never applies it.

    Keys: file, bytes, name, naming (of the keys), trainer, family, base, category, triggers, tags
    (the ten most frequent captions' tags with counts), modules (count per component), text_encoder,
    rank and alpha (smallest and largest), dtypes, leftover (what strict reading refuses, reason by
    key), forms (unsupported parametrisations), sha256, autov2, autov3.

    Raises:
        CmloraError: if the file cannot be read at all, or holds no LoRA in any form.
    """
    source = _read(path, 2)
    if not source.layout.modules and not source.layout.forms:
        source.settle(strict=False)
    lora, head, digest = source.lora, source.header, source.sha256 or sha256(path)
    ranks = [update.rank for update in lora.updates.values()]
    alphas = [peft_config.alpha(u.scale, u.rank) for u in lora.updates.values()]
    return {
        "file": str(path),
        "bytes": Path(path).stat().st_size,
        "name": lora.name,
        "naming": source.layout.naming,
        "trainer": _trainer(head.metadata),
        "family": family.of_lora(lora),
        "base": lora.metadata.get("cmlora.base") or lora.metadata.get("ss_sd_model_name"),
        "category": lora.category,
        "triggers": list(lora.triggers),
        "tags": _tags(head.metadata),
        "modules": {component: len(updates) for component, updates in lora.parts.items()},
        "text_encoder": any(component in TEXT_ENCODERS for component in lora.parts),
        "rank": [min(ranks), max(ranks)] if ranks else None,
        "alpha": [min(alphas), max(alphas)] if alphas else None,
        "dtypes": sorted({str(u.down.dtype).removeprefix("torch.") for u in lora.updates.values()}),
        "leftover": dict(sorted(source.layout.leftover.items())),
        "forms": list(source.layout.forms),
        "sha256": digest,
        "autov2": digest[:10],
        "autov3": sha256(path, head.start)[:12],
    }


@dataclass(frozen=True)
class _Source:
    path: PathLike
    header: container.Header
    layout: keys.Layout
    lora: LoRA
    sha256: str

    def settle(self, strict: bool) -> None:
        """Raises if something was left over, or warns."""
        left, forms = self.layout.leftover, self.layout.forms
        if not self.layout.modules and not forms:
            examples = listing(sorted(self.header.shapes))
            raise CmloraError(f"{self.path} holds no LoRA; it holds {examples or 'no tensors'}")
        if not left:
            return
        reasons = ", ".join(forms) + " is not supported yet" if forms else "not understood"
        message = (
            f"{self.path}: {len(left)} of {len(self.header.shapes)} keys left over, {reasons}: "
            + listing([f"{key} ({reason})" for key, reason in sorted(left.items())])
        )
        if strict or not self.layout.modules:
            hint = "; strict=False leaves them out" if self.layout.modules else ""
            raise CmloraError(message + hint)
        warnings.warn(message, stacklevel=4)


def _read(path: PathLike, layers_per_block: int) -> _Source:
    header = container.header(path)
    layout = keys.layout(header.shapes, layers_per_block)
    where = str(path)
    configs = peft_config.scales(header.metadata.get("lora_adapter_metadata"), where)
    exact = _json(header.metadata, "cmlora.scales", dict, path) or {}
    # A whole checkpoint of gigabytes is not read only to be refused.
    tensors, digest = container.content(path) if layout.modules else ({}, "")
    updates: dict[str, Update] = {}
    for module, roles in layout.modules.items():
        try:
            down, up = tensors[roles["down"]], tensors[roles["up"]]
            mid = tensors[roles["mid"]] if "mid" in roles else None
            if any(size != 1 for size in up.shape[2:]):
                raise ValueError(f"up {tuple(up.shape)} is not (out, rank)")
            update = Update(down, up.flatten(1) if up.ndim > 2 else up, mid=mid)
            if not all((*update.shape, update.rank)):
                raise ValueError(f"down {tuple(down.shape)} and up {tuple(up.shape)} are empty")
            component, _, name = module.partition(".")
            if "alpha" in roles:
                scale = _alpha(tensors[roles["alpha"]], down.shape[0]) / down.shape[0]
            else:
                scale = peft_config.scale(configs.get(component, {}), name, down.shape[0])
            updates[module] = replace(update, scale=float(exact.get(module, scale)))
        except (ValueError, TypeError) as error:
            raise CmloraError(f"{path}: {roles['down']}: {error}") from None
    metadata = {k: v for k, v in header.metadata.items() if k not in _STRUCTURE}
    name = header.metadata.get("cmlora.name") or Path(path).stem
    lora = LoRA(name, updates, metadata, _triggers(header.metadata, path))
    return _Source(path, header, layout, lora, digest)


def _alpha(tensor: Tensor, rank: int) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"alpha has {tensor.numel()} values instead of one")
    # Trainers that store 0 mean "no alpha", which is the rank.
    return float(tensor.item()) or float(rank)


def _triggers(metadata: Mapping[str, str], path: PathLike) -> tuple[str, ...]:
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


def _trainer(metadata: Mapping[str, str]) -> str:
    for key, trainer in (
        ("cmlora.name", "cmlora"),
        ("ot_config", "OneTrainer"),
        ("ss_network_module", "kohya"),
        ("lora_adapter_metadata", "diffusers"),
    ):
        if key in metadata:
            module = metadata.get("ss_network_module", "") if trainer == "kohya" else ""
            return f"{trainer} ({module})" if module else trainer
    return metadata.get("modelspec.implementation", "unknown")


def _tags(metadata: Mapping[str, str]) -> dict[str, int]:
    """The most frequent tags of the training captions, from kohya's header; empty if damaged."""
    counts: dict[str, int] = {}
    try:
        for folder in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
            for tag, count in folder.items():
                counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return dict(ordered[:10])
