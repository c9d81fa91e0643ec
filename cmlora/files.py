"""LoRA files: every trainer's safetensors in, diffusers' safetensors out.

Reading is strict: what cannot be read completely is an error that names the keys. Nothing is ever
unpickled.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmlora import container, family, forms, fused, insert, keys, peft_config, rest
from cmlora.container import sha256 as sha256
from cmlora.errors import CmloraError
from cmlora.forms import Change, Parts
from cmlora.insert import Applied as Applied
from cmlora.insert import listing
from cmlora.lora import TEXT_ENCODERS, LoRA, Update, dense
from cmlora.originals import Target
from cmlora.rest import Remainder

PathLike = str | os.PathLike[str]

_STRUCTURE = ("format", "lora_adapter_metadata", "cmlora.scales", "cmlora.triggers", "cmlora.name")
# Hashes of the tensors of another file.
_STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def read(path: PathLike, *, strict: bool = True, layers_per_block: int = 2) -> LoRA:
    """Reads a LoRA written by any trainer.

    Files that can only be worked out with the model's weights, or that change more than matrices,
    are refused; `load` takes them, and `convert` makes a LoRA of them.

    Args:
        path: a safetensors file.
        strict: a key that is not understood is an error; otherwise a warning that counts them.
        layers_per_block: of the UNet, for files with LDM block numbers; 2 in every real one.

    Raises:
        CmloraError: if the file is missing, not safetensors, damaged, not a LoRA, or not readable
            completely.
    """
    source = open_file(path, layers_per_block=layers_per_block)
    lora, left = source.plain()
    source.settle(strict, left)
    return lora


def load(pipe: Any, path: PathLike, name: str, *, strict: bool = True) -> Applied:
    """Reads a LoRA and puts it into a diffusers pipeline, or leaves the pipeline as it is.

    Whatever form the file has, the model ends up with exactly the changes that it describes, at
    strength 1; between 0 and 1 the change of the weights is scaled.

    Args:
        pipe: the pipeline; its UNet or transformer and its text encoders are adapted.
        path: see `read`.
        name: of the adapter in the pipeline.
        strict: anything that cannot be applied is an error; otherwise a warning that counts it.

    Raises:
        CmloraError: see `read` and `cmlora.insert.insert`.
    """
    source = open_file(path, pipe)
    source.settle(strict)
    applied = insert.insert(
        pipe, source.lora, name, strict=strict, source=str(path), remainder=source.remainder
    )
    skipped = (*sorted(source.layout.leftover), *applied.skipped)
    return replace(applied, sha256=source.sha256, skipped=skipped)


def convert(
    path: PathLike, pipe: Any = None, *, rank: int | None = None, strict: bool = True
) -> tuple[LoRA, float]:
    """A file of any form as an ordinary LoRA.

    Args:
        path: see `read`.
        pipe: a pipeline with the weights that the file depends on, if it does.
        rank: the largest rank of a layer that is no LoRA in the file; ``None`` keeps the update
            whole, as a product with the identity.
        strict: what cannot become a LoRA (biases, norms) is an error; otherwise a warning.

    Returns:
        The LoRA, and the norm of what truncation lost divided by the norm of the whole update.

    Raises:
        CmloraError: see `read`; also if a pipeline is needed and not given, or does not fit.
    """
    if rank is not None and rank < 1:
        raise CmloraError(f"rank is {rank}, not 1 or more")
    source = open_file(path, pipe)
    lora, left = source.plain()
    matrices: dict[str, Tensor] = dict(source.whole)
    if pipe is not None and source.remainder:
        shifts, missing = rest.resolve(pipe, source.remainder, str(path))
        left = {f"{name} ": "it is not in the pipeline" for name in missing}
        for module, shift in rest.deltas(shifts):
            if shift.weight is not None and shift.weight.ndim in (2, 4):
                matrices[module] = shift.weight
            elif shift.weight is not None:
                left[f"{module}.weight"] = "no matrix, for which a LoRA has no place"
            if shift.bias is not None and bool(shift.bias.any()):
                left[f"{module}.bias"] = "a bias, for which a LoRA has no place"
    source.settle(strict, left)
    lost = total = 0.0
    updates = dict(lora.updates)
    for module, matrix in matrices.items():
        whole = dense(matrix)
        updates[module] = whole if rank is None else _cut(matrix, rank)
        total += float(matrix.double().norm()) ** 2
        if rank is not None:
            lost += float((matrix - updates[module].delta()).double().norm()) ** 2
    for module in lora.updates.keys() - matrices.keys():
        norm, update = lora.updates[module].norm(), lora.updates[module]
        total += norm**2
        if rank is not None and update.rank > rank:
            cut = update.truncate(rank)
            kept = cut.norm()
            lost, updates[module] = lost + max(norm**2 - kept**2, 0.0), cut
    return replace(lora, updates=updates), math.sqrt(lost / total) if total else 0.0


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
    """Everything worth knowing about a file; see `cmlora.describe.describe`."""
    from cmlora import describe

    return describe.describe(path)


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

    def plain(self) -> tuple[LoRA, dict[str, str]]:
        """The file without a model: whole matrices are updates, and what needs a model is left."""
        left: dict[str, str] = {}
        for (target, change), key in zip(self.remainder.changes, self.remainder.keys, strict=True):
            if change.bias is not None or target.name not in self.known:
                titles = " and ".join(forms.titles(self.layout.modules[target.name]))
                why = "it depends on the model" if change.weight is not None else "no matrix alone"
                left[key] = f"{titles}: {why}; cmlora.files.load and cmlora convert take it"
        updates = {module: dense(matrix) for module, matrix in self.whole.items()}
        return replace(self.lora, updates={**self.lora.updates, **updates}), left

    def settle(self, strict: bool, left: Mapping[str, str] | None = None) -> None:
        """Raises if something was left over, or warns."""
        if not self.layout.modules:
            examples = listing(sorted(self.header.shapes))
            reasons = sorted(set(self.layout.leftover.values()) - {"unknown name"})
            holds = f"{', '.join(reasons)}: {examples}" if reasons else examples or "no tensors"
            raise CmloraError(f"{self.path} holds no LoRA; it holds {holds}")
        found = {**self.layout.leftover, **(left or {})}
        if not found:
            return
        message = (
            f"{self.path}: {len(found)} of {len(self.header.shapes)} keys left over: "
            + listing([f"{key.strip()} ({reason})" for key, reason in sorted(found.items())])
        )
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
    denoiser = rest.plain(unet if unet is not None else getattr(pipe, "transformer", None))
    names = [name for name, _ in denoiser.named_modules()] if denoiser is not None else []
    layout = keys.layout(
        header.shapes, layers if isinstance(layers, int) else 2, header.shapes, names
    )
    where = str(path)
    configs = peft_config.scales(header.metadata.get("lora_adapter_metadata"), where)
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
        key = roles.get("down") or min(roles.values())
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
            parts = _parts(held, config, name, exact.get(module))
            dtypes[module] = str(tensors[key].dtype).removeprefix("torch.")
            if parts.alpha is not None:
                alphas[module] = parts.alpha
            change = forms.read(parts)
            if change.update is not None and change.weight is None:
                updates |= fused.share(_kernel(change.update, target), target)
                change = replace(change, update=None)
            if change.dense is not None and change.weight is None:
                matrices = _split(change.dense, target)
                whole |= matrices
                known |= {module} if matrices else set()
            if change.dense is not None or change.weight is not None or change.bias is not None:
                changes.append((target, change))
                firsts.append(key)
        except (ValueError, TypeError, RuntimeError, IndexError, OverflowError) as error:
            raise CmloraError(f"{path}: {key}: {' '.join(str(error).split())}") from None
    metadata = {k: v for k, v in header.metadata.items() if k not in _STRUCTURE}
    title = header.metadata.get("cmlora.name") or Path(path).stem
    lora = LoRA(title, updates, metadata, _triggers(header.metadata, path))
    found = family.of_lora(lora, layout.table, widths)
    remainder = Remainder(tuple(changes), tuple(firsts), found)
    return Source(
        path, header, layout, lora, whole, frozenset(known), remainder, digest, alphas, dtypes
    )


def _parts(held: Mapping[str, Tensor], config: Mapping[str, Any], name: str, exact: Any) -> Parts:
    """The tensors of a layer with everything that decides its strength."""
    alpha = _alpha(held["alpha"]) if "alpha" in held else None

    def ratio(rank: int) -> float:
        if not rank:
            raise ValueError("its rank is zero, its factors are empty")
        if exact is not None:
            return float(exact)
        if alpha is not None:
            # Trainers that store 0 mean "no alpha", which is the rank.
            return (alpha or float(rank)) / rank
        return peft_config.scale(config, name, rank)

    settings = dict(config)
    feedforward = config.get("feedforward_modules")
    if isinstance(feedforward, list):
        settings["feedforward"] = any(
            name == str(each) or name.endswith(f".{each}") for each in feedforward
        )
    return Parts(held, settings, ratio, alpha)


def _kernel(update: Update, target: Target) -> Update:
    """The update of a UNet's 3x3 convolution, whose kernel some trainers flatten."""
    last = target.modules[0].rpartition(".")[2]
    columns = update.down.shape[1]
    if not target.modules[0].startswith("unet.") or update.down.ndim != 2 or columns % 9:
        return update
    if last not in ("conv", "conv1", "conv2", "conv_in", "conv_out"):
        return update
    return replace(update, down=update.down.reshape(update.rank, columns // 9, 3, 3))


def _split(delta: Tensor, target: Target) -> dict[str, Tensor]:
    """A whole matrix as those of its modules; none if it is no matrix, or only a model tells."""
    if delta.ndim not in (2, 4):
        return {}
    try:
        widths = fused.sizes(target, *delta.shape[:2])
    except ValueError:
        return {}
    rows = fused.swapped(delta, target, delta.shape[1])
    return dict(zip(target.modules, rows.split(widths), strict=True))


def _cut(matrix: Tensor, rank: int) -> Update:
    """The nearest update of a rank (Eckart-Young)."""
    left, values, right = torch.linalg.svd(matrix.flatten(1).double(), full_matrices=False)
    root = values[:rank].sqrt()
    down = (root[:, None] * right[:rank]).float()
    return Update(down.reshape(-1, *matrix.shape[1:]), (left[:, :rank] * root).float())


def _alpha(tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"alpha has {tensor.numel()} values instead of one")
    return float(tensor.item())


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
