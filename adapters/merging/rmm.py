"""A library of LoRAs as a mean, a few basis vectors and coefficients; each can be rebuilt."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cmlora import container
from cmlora.adapters.merging.check import check_shape, check_values
from cmlora.adapters.merging.factors import Pair, canonical
from cmlora.adapters.merging.written import widest
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update

PathLike = str | os.PathLike[str]

_KEY = "cmlora.pack"


@dataclass(frozen=True)
class Pack:
    """Several LoRAs in one basis.

    Args:
        names: of the LoRAs.
        tensors: per module ``<module>.mean`` (P, R), ``.basis`` (P, R, p) and ``.coefficients``
            (P, p, N); P counts positions (rows of up and columns of down), or is 1 with R all
            numbers of the module.
        layout: what else is needed to rebuild: shapes, ranks, triggers and metadata.
        errors: relative distance of every rebuilt LoRA.
    """

    names: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    layout: Mapping[str, Any]
    errors: Mapping[str, float]

    @property
    def numbers(self) -> int:
        """How many numbers are stored."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Of these numbers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def pack(
    loras: Sequence[LoRA],
    size: int,
    *,
    granularity: Literal["position", "module"] = "module",
    force: bool = False,
) -> Pack:
    """Principal components over the LoRAs (arXiv:2510.14163): x_i = mean + U c_i.

    Args:
        loras: of one family, with different names. They are written in canonical factors first,
            so that positions of different LoRAs mean the same.
        size: p, how many basis vectors; their number less one rebuilds all exactly.
        granularity: ``position`` has a basis for every row and column of the factors (the
            paper's), ``module`` one for every module.
        force: accept a size that saves nothing.

    Raises:
        CmloraError: if names repeat, LoRAs do not fit each other, or nothing would be saved.
    """
    names = tuple(lora.name for lora in loras)
    if len(set(names)) < len(names) or len(names) < 2:
        raise CmloraError(f"a pack needs two or more LoRAs with different names, not {names}")
    if not 0 <= size < len(names):
        raise CmloraError(
            f"size {size} is not possible; {len(names)} LoRAs allow 0 to {len(names) - 1}"
        )
    check_values(loras)
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, Any] = {}
    lost, total = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    original = 0
    for module in sorted({module for lora in loras for module in lora.updates}):
        there = {lora.name: lora.updates[module] for lora in loras if module in lora.updates}
        check_shape(module, list(there.items()))
        factors = [t for u in there.values() for t in (u.up, u.down, u.mid) if t is not None]
        original += sum(factor.nbytes for factor in factors)
        shape = max((update.shape for update in there.values()), key=len)
        ranks = {name: update.rank for name, update in there.items()}
        width, rows = max(ranks.values()), shape[0]
        positions = rows + math.prod(shape[1:])
        stacked = torch.zeros(positions, width, len(names), dtype=torch.double)
        for index, name in enumerate(names):
            if name in there:
                own = canonical(Pair(*there[name].factors()))
                stacked[:rows, : own.rank, index] = own.up
                stacked[rows:, : own.rank, index] = own.down.T
        vectors = stacked if granularity == "position" else stacked.reshape(1, -1, len(names))
        dtype = widest(list(there.values()))
        parts = [part.to(dtype) for part in components(vectors, size)]
        for kind, part in zip(("mean", "basis", "coefficients"), parts, strict=True):
            tensors[f"{module}.{kind}"] = part.contiguous()
        shapes[module] = {"shape": list(shape), "rank": width, "ranks": ranks}
        rebuilt = _rebuilt(parts).reshape(stacked.shape)
        for index, name in enumerate(names):
            before, after = (
                stack[:rows, :, index] @ stack[rows:, :, index].T for stack in (stacked, rebuilt)
            )
            lost[name] += float((after - before).square().sum())
            total[name] += float(before.square().sum())
    layout = {
        "granularity": granularity,
        "size": size,
        "modules": shapes,
        "loras": [
            {"name": x.name, "triggers": list(x.triggers), "metadata": dict(x.metadata)}
            for x in loras
        ],
    }
    errors = {name: math.sqrt(lost[name] / total[name]) if total[name] else 0.0 for name in names}
    packed = Pack(names, tensors, layout, errors)
    if packed.bytes >= original and not force:
        raise CmloraError(
            f"size {size} saves nothing: {packed.bytes} bytes instead of {original}; "
            "choose a smaller one"
        )
    return packed


def rebuild(packed: Pack, name: str) -> LoRA:
    """One LoRA out of a pack, with scale 1 everywhere.

    Raises:
        CmloraError: if it is not in the pack.
    """
    if name not in packed.names:
        raise CmloraError(f"no LoRA {name!r} in the pack; it holds {', '.join(packed.names)}")
    index = packed.names.index(name)
    updates = {}
    for module, facts in packed.layout["modules"].items():
        rank = facts["ranks"].get(name, 0)
        if not rank:
            continue
        mean, basis, coefficients = (
            packed.tensors[f"{module}.{kind}"] for kind in ("mean", "basis", "coefficients")
        )
        found = _rebuilt([mean, basis, coefficients[..., index : index + 1]])
        found = found.reshape(-1, facts["rank"])[:, :rank].to(mean.dtype)
        rows, *columns = facts["shape"]
        down = found[rows:].T.reshape(rank, *columns)
        updates[module] = Update(down.contiguous(), found[:rows].contiguous())
    about = packed.layout["loras"][index]
    return LoRA(name, updates, about["metadata"], tuple(about["triggers"]))


def components(vectors: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (P, D), basis (P, D, p) and coefficients (P, p, N) of vectors (P, D, N)."""
    mean = vectors.mean(2)
    centred = vectors - mean[..., None]
    u, s, vh = torch.linalg.svd(centred, full_matrices=False)
    return mean, u[..., :size], s[..., :size, None] * vh[..., :size, :]


def save(packed: Pack, path: PathLike) -> None:
    """Writes a pack as safetensors; the file appears whole or not at all."""
    about = {"names": packed.names, "layout": packed.layout, "errors": packed.errors}
    container.save(path, dict(packed.tensors), {"format": "pt", _KEY: json.dumps(about)})


def load(path: PathLike) -> Pack:
    """Reads a pack.

    Raises:
        CmloraError: if the file is none.
    """
    text = container.header(path).metadata.get(_KEY)
    if text is None:
        raise CmloraError(f"{path} is no pack of LoRAs")
    try:
        about = json.loads(text)
        tensors, _ = container.content(path)
        layout = about["layout"]
        expected = {
            f"{m}.{k}" for m in layout["modules"] for k in ("mean", "basis", "coefficients")
        }
        if expected != tensors.keys():
            raise ValueError
        if not all(re.fullmatch(r"[\w. -]*\w", name) for name in about["names"]):
            raise ValueError  # names become file names
        return Pack(tuple(about["names"]), tensors, layout, about["errors"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CmloraError(f"{path}: the description of the pack is damaged") from None


def _rebuilt(parts: Sequence[Tensor]) -> Tensor:
    mean, basis, coefficients = (part.double() for part in parts)
    return mean[..., None] + basis @ coefficients
