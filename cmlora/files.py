"""LoRA files: every trainer's safetensors in, diffusers' safetensors out.

Reading is strict: what cannot be read completely is an error that names the keys. Nothing is ever
unpickled.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmlora import aim, container, denoisers, family, insert, peft_config, rest
from cmlora.container import sha256 as sha256
from cmlora.errors import CmloraError
from cmlora.forms import joined
from cmlora.insert import Applied as Applied
from cmlora.listing import listing
from cmlora.lora import TEXT_ENCODERS, LoRA, Update, dense
from cmlora.source import Source, trigger_words
from cmlora.source import open_file as open_file

PathLike = str | os.PathLike[str]

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


def load(
    pipe: Any,
    path: PathLike,
    name: str,
    *,
    strict: bool = True,
    into: str | Sequence[str] | None = None,
    strength: float = 1.0,
) -> Applied:
    """Reads a LoRA and puts it into a diffusers pipeline, or leaves the pipeline as it is.

    Whatever form the file has, the model ends up with exactly the changes that it describes, at
    strength 1; between 0 and 1 the change of the weights is scaled.

    Args:
        pipe: the pipeline; its UNet or transformer and its text encoders are adapted.
        path: see `read`.
        name: of the adapter in the pipeline.
        strict: anything that cannot be applied is an error; otherwise a warning that counts it.
        into: the denoisers it goes into, such as ``transformer_2`` or both of Wan 2.2's; by
            default where its names say, which is the first one in nearly all files. A LoRA of
            this name may then be in the pipeline's other models already.
        strength: multiplies the file's changes, whatever strength they have later.

    Raises:
        CmloraError: see `read`, `cmlora.aim.aimed` and `cmlora.insert.insert`.
    """
    source = open_file(path, pipe)
    source.settle(strict)
    source = aim.aimed(source, pipe, denoisers.chosen(into))
    applied = insert.insert(
        pipe,
        source.lora,
        name,
        strict=strict,
        source=str(path),
        remainder=source.remainder,
        strength=strength,
        further=bool(into),
    )
    skipped = (*sorted(source.layout.leftover), *applied.skipped)
    return replace(applied, sha256=source.sha256, skipped=skipped, config=source.config)


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
        CmloraError: see `read`; also if a pipeline is needed and not given, does not fit or, strict
            or not, is of another family.
    """
    if rank is not None and rank < 1:
        raise CmloraError(f"rank is {rank}, not 1 or more")
    source = open_file(path, pipe)
    lora, left = source.plain()
    matrices = source.matrices()
    if pipe is not None and source.remainder:
        shifts, missing = _resolved(source, pipe, strict)
        left = {f"{name} ": "it is not in the pipeline" for name in missing}
        for module, shift in rest.deltas(shifts):
            if shift.weight is not None and _shape(pipe, module) is not None:
                matrices[module] = joined(source.lora.updates.get(module), shift.weight)
            elif shift.weight is not None:
                left[f"{module}.weight"] = "no matrix, for which a LoRA has no place"
            if shift.bias is not None and bool(shift.bias.any()):
                left[f"{module}.bias"] = "a bias, for which a LoRA has no place"
    source.settle(strict, left)
    lost = total = 0.0
    updates = {
        m: update if pipe is None else _fitted(pipe, m, update)
        for m, update in lora.updates.items()
    }
    for module, matrix in matrices.items():
        whole = dense(matrix)
        updates[module] = whole if rank is None else _cut(matrix, rank)
        total += float(matrix.double().norm()) ** 2
        if rank is not None:
            lost += float((matrix - updates[module].delta()).double().norm()) ** 2
    for module in lora.updates.keys() - matrices.keys():
        norm, update = updates[module].norm(), updates[module]
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
    return trigger_words(container.header(path).metadata, path)


def describe(path: PathLike) -> dict[str, Any]:
    """Everything worth knowing about a file; see `cmlora.describe.describe`."""
    from cmlora import describe

    return describe.describe(path)


def _resolved(
    source: Source, pipe: Any, strict: bool
) -> tuple[dict[str, dict[str, rest.Shift]], list[str]]:
    """What a file changes of a pipeline of its own family, and the modules that are missing.

    Raises:
        CmloraError: if the pipeline is of another family, or a layer does not fit.
    """
    made_for, theirs = source.remainder.family, family.of_pipe(pipe)
    families = f"{source.path} is for {made_for} and the pipeline is {theirs}"
    hint = "give the model it was made for, which is --model on the command line"
    others = len(family.distinct((made_for, theirs))) > 1
    try:
        shifts, missing = rest.resolve(pipe, source.remainder, str(source.path))
    except CmloraError as error:
        raise CmloraError(f"{error}; {hint}" if others else str(error)) from None
    if missing and others:
        count = "is" if len(missing) == 1 else "are"
        raise CmloraError(f"{families}: {listing(missing)} {count} not in the pipeline; {hint}")
    header = family.contradiction(source.lora, made_for, theirs)
    if header is not None and strict:
        raise CmloraError(
            f"{families}: its header says {header}, although its layers fit; {hint}, or "
            "strict=False if the header is wrong"
        )
    if header is not None:
        warnings.warn(f"{families}: converted although its header says {header}", stacklevel=3)
    return shifts, missing


def _fitted(pipe: Any, module: str, update: Update) -> Update:
    """An update with the kernel of the layer that it is for."""
    shape = _shape(pipe, module)
    if shape is None or update.mid is not None or update.down[0].numel() != math.prod(shape[1:]):
        return update
    return replace(update, down=update.down.reshape(update.rank, *shape[1:]))


def _shape(pipe: Any, module: str) -> tuple[int, ...] | None:
    """The shape of a linear layer's or convolution's matrix; nothing for other layers."""
    component, _, name = module.partition(".")
    layer, _ = rest.find(rest.plain(getattr(pipe, component, None)), component, name)
    return None if layer is None else rest.shape_of(layer)


def _cut(matrix: Tensor, rank: int) -> Update:
    """The nearest update of a rank (Eckart-Young)."""
    left, values, right = torch.linalg.svd(matrix.flatten(1).double(), full_matrices=False)
    root = values[:rank].sqrt()
    down = (root[:, None] * right[:rank]).float()
    return Update(down.reshape(-1, *matrix.shape[1:]), (left[:, :rank] * root).float())
