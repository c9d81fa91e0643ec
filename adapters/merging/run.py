"""Carries a merging method out on whole LoRAs: checked, module by module, with a report."""

from __future__ import annotations

import json
import math
import re
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmlora.adapters.merging.check import check_shape, check_values
from cmlora.adapters.merging.factors import Pair, nearest, stack, truncate
from cmlora.adapters.merging.method import Method, Outcome, read_options
from cmlora.adapters.merging.result import MergeResult, Report
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update

Grams = Mapping[str, Mapping[str, Tensor]]

_NOTHING = 1e-30
"""Updates with a smaller norm vanish in single precision."""

_INHERITED = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "cmlora.base")


class _Part(NamedTuple):
    """What one LoRA does to one module."""

    lora: str
    update: Update
    weight: float


def run(
    title: str,
    method: Method,
    loras: Sequence[LoRA],
    weights: Sequence[float],
    *,
    name: str | None,
    rank: int | None,
    seed: int,
    grams: Grams | None,
    options: Mapping[str, Any],
    advance: Callable[[int, int], None] | None,
) -> MergeResult:
    """Merges LoRAs; the arguments are those of `cmlora.adapters.merging.merge`."""
    started = time.perf_counter()
    values = read_options(title, method, options)
    _check(title, method, loras, weights)
    order = sorted(range(len(loras)), key=lambda i: (loras[i].name, weights[i]))
    # A LoRA whose slider is at zero is not part of the merge, whatever a formula divides by.
    used = [(loras[i], float(weights[i])) for i in order if weights[i]]
    table = _table(used)
    ceiling = max(map(_ceiling, table.values()), default=1)
    if rank is not None and not 1 <= rank <= ceiling:
        raise CmloraError(f"rank {rank} is not possible; these LoRAs allow 1 to {ceiling}")
    dtype = _precision([lora for lora, _ in used])
    updates: dict[str, Update] = {}
    lost: dict[str, list[tuple[float, float]]] = {}
    notes: dict[str, list[float]] = {}
    remarks: dict[str, None] = {}
    for index, (module, parts) in enumerate(table.items()):
        if advance is not None:
            advance(index, len(table))
        parts, pairs, sizes = _present(parts)
        if not parts:
            continue
        strengths = [part.weight for part in parts]
        exact = stack(pairs, strengths)
        given: dict[str, Any] = {"rank": rank, "exact": exact}
        given["generator"] = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{module}".encode()))
        if method.takes("grams"):
            given["grams"] = [_gram(title, grams, part, module) for part in parts]
        given = {key: value for key, value in given.items() if method.takes(key)} | values
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            try:
                found = method.function(pairs, strengths, **given)
            except CmloraError as mistake:
                raise CmloraError(f"{title}: {module}: {mistake}") from None
        remarks |= dict.fromkeys(str(w.message) for w in said)
        if isinstance(found, Outcome):
            for key, number in found.notes.items():
                notes.setdefault(key, []).append(number)
            found = found.value
        pair = _of_rank(found, rank, _ceiling(parts))
        if not pair.rank:
            continue
        scale = math.fsum(abs(w) * size for w, size in zip(strengths, sizes, strict=True))
        lost.setdefault(block(module), []).append(_distance(pair, exact, scale))
        updates[module] = _update(pair, parts, dtype, remarks)
    report = Report(
        method=title,
        kind=method.kind,
        errors={where: _relative(rows) for where, rows in sorted(lost.items())},
        error=_relative([row for rows in lost.values() for row in rows]),
        rank=max((update.rank for update in updates.values()), default=0),
        bytes=sum(update.up.nbytes + update.down.nbytes for update in updates.values()),
        seconds=time.perf_counter() - started,
        notes={key: math.fsum(rows) / len(rows) for key, rows in notes.items()},
        warnings=tuple(remarks),
    )
    recipe: dict[str, Any] = {"method": title, "rank": rank, "seed": seed, "options": values}
    recipe |= {"loras": [lora.name for lora, _ in used], "weights": [w for _, w in used]}
    metadata = _inherited([lora for lora, _ in used])
    metadata["modelspec.merged_from"] = ",".join(lora.name for lora, _ in used)
    metadata["cmlora.merge"] = json.dumps(recipe, sort_keys=True)
    triggers = dict.fromkeys(word for lora, _ in used for word in lora.triggers)
    merged = LoRA(name or "+".join(recipe["loras"]), updates, metadata, tuple(triggers))
    return MergeResult(merged, report)


def block(module: str) -> str:
    """The part of the model a module belongs to: its name up to the first number.

    >>> block("unet.down_blocks.0.attentions.1.proj_in")
    'unet.down_blocks.0'
    """
    found = re.match(r"(.*?\.\d+)\.", module)
    return found[1] if found else module.rpartition(".")[0]


def _check(title: str, method: Method, loras: Sequence[LoRA], weights: Sequence[float]) -> None:
    if len(loras) != len(weights):
        raise CmloraError(f"{len(loras)} LoRAs and {len(weights)} weights; give one weight each")
    for lora, weight in zip(loras, weights, strict=True):
        if not math.isfinite(weight):
            raise CmloraError(f"the weight of {lora.name} is {weight}, not a finite number")
    count = sum(bool(weight) for weight in weights)
    if not count:
        raise CmloraError("nothing to merge: no LoRA has a weight other than zero")
    if "many" not in method.promises and count > 2:
        raise CmloraError(f"{title} merges two LoRAs, not {count}")
    check_values(loras)


def _table(used: Sequence[tuple[LoRA, float]]) -> dict[str, list[_Part]]:
    """By module what the LoRAs do to it."""
    table: dict[str, list[_Part]] = {}
    for module in sorted({module for lora, _ in used for module in lora.updates}):
        rows = [(lora, lora.updates[module], w) for lora, w in used if module in lora.updates]
        check_shape(module, [(lora.name, update) for lora, update, _ in rows])
        table[module] = [_Part(lora.name, update, weight) for lora, update, weight in rows]
    return table


def _present(parts: Sequence[_Part]) -> tuple[list[_Part], list[Pair], list[float]]:
    """What is left, with factors and norms, when updates of zero are treated like missing ones."""
    pairs = [Pair(*part.update.factors()) for part in parts]
    sizes = [pair.norm() for pair in pairs]
    rows = [row for row in zip(parts, pairs, sizes, strict=True) if row[2] > _NOTHING]
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def _ceiling(parts: Sequence[_Part]) -> int:
    """The largest rank that the weighted sum of the updates can have."""
    rows, columns, *kernel = parts[0].update.shape
    return min(rows, columns * math.prod(kernel), sum(part.update.rank for part in parts))


def _gram(title: str, grams: Grams | None, part: _Part, module: str) -> Tensor:
    try:
        return (grams or {})[part.lora][module].double()
    except KeyError:
        raise CmloraError(
            f"{title} needs calibration data, and there is none of {part.lora} for {module}"
        ) from None


def _precision(loras: Sequence[LoRA]) -> torch.dtype:
    dtypes = [t.dtype for lora in loras for u in lora.updates.values() for t in (u.down, u.up)]
    return reduce(torch.promote_types, dtypes, dtypes[0] if dtypes else torch.float32)


def _of_rank(found: Pair | Tensor, rank: int | None, ceiling: int) -> Pair:
    if isinstance(found, Tensor):
        return nearest(found, min(rank or ceiling, ceiling))
    return truncate(found, rank) if rank is not None and found.rank > rank else found


def _distance(pair: Pair, exact: Pair, scale: float) -> tuple[float, float]:
    """Distance and norm of the exact sum; a sum that cancels counts as large as its parts."""
    size = exact.norm()
    return pair.distance(exact), size if size > 1e-9 * scale else scale


def _relative(rows: Sequence[tuple[float, float]]) -> float:
    lost, size = (math.hypot(*column) for column in zip(*rows, strict=True)) if rows else (0, 1)
    return lost / size


def _update(
    pair: Pair, parts: Sequence[_Part], dtype: torch.dtype, remarks: dict[str, None]
) -> Update:
    kernel = max((part.update.shape[2:] for part in parts), key=len)
    columns = parts[0].update.shape[1]
    down, up = pair.down.to(dtype), pair.up.to(dtype)
    if not (down.isfinite().all() and up.isfinite().all()):
        pair, dtype = truncate(pair), torch.float32
        remarks[f"merged in float32: values are too large for {down.dtype}"] = None
        down, up = pair.down.to(dtype), pair.up.to(dtype)
    return Update(down.reshape(pair.rank, columns, *kernel).contiguous(), up.contiguous())


def _inherited(loras: Sequence[LoRA]) -> dict[str, str]:
    """What all files agree on about the model they are for."""
    found = {}
    for key in _INHERITED:
        said = {lora.metadata.get(key) for lora in loras}
        value = said.pop()
        if value is not None and not said:
            found[key] = value
    return found
