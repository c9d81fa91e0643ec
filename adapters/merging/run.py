"""Carries a merging method out on whole LoRAs: checked, module by module, with a report."""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmlora.adapters.merging.account import Account
from cmlora.adapters.merging.check import NOTHING, ceiling, check_rank, check_shape, check_values
from cmlora.adapters.merging.factors import Pair, dense_norm, nearest, stack, truncate
from cmlora.adapters.merging.method import Method, Outcome, read_options
from cmlora.adapters.merging.result import MergeResult
from cmlora.adapters.merging.tally import block as block
from cmlora.adapters.merging.written import baked, inherited, widest
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update

Grams = Mapping[str, Mapping[str, Tensor]]


class _Part(NamedTuple):
    """What one LoRA does to one module.

    Args:
        lora: its number among those that are merged.
        pair: of rank 0 if it leaves the module alone.
        weight: of the LoRA.
    """

    lora: int
    pair: Pair
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
    account = Account()
    values = read_options(title, method, options)
    _check(title, method, loras, weights)
    order = sorted(range(len(loras)), key=lambda i: (loras[i].name, weights[i]))
    # A LoRA whose slider is at zero is not part of the merge, whatever a formula divides by.
    used = [(loras[i], float(weights[i])) for i in order if weights[i]]
    table = _table(used)
    check_rank(rank, [list(row.values()) for row in table.values()])
    dtype = widest([update for lora, _ in used for update in lora.updates.values()])
    limits = None
    if method.survey is not None:
        limits = method.survey(lambda: _whole(table, used), len(used), values)
    updates: dict[str, Update] = {}
    for index, (module, row) in enumerate(table.items()):
        if advance is not None:
            advance(index, len(table))
        parts = _parts(row, used, method.absent)
        if not parts:
            continue
        pairs, strengths = [part.pair for part in parts], [part.weight for part in parts]
        exact = stack(pairs, strengths)
        given: dict[str, Any] = {"rank": rank, "exact": exact}
        given["generator"] = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{module}".encode()))
        if method.takes("grams"):
            names = [used[part.lora][0].name for part in parts]
            given["grams"] = [_gram(title, grams, name, module) for name in names]
        if limits is not None:
            given["limits"] = [limits[part.lora] for part in parts]
        given = {key: value for key, value in given.items() if method.takes(key)} | values
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            try:
                found = method.function(pairs, strengths, **given)
            except CmloraError as mistake:
                raise CmloraError(f"{title}: {module}: {mistake}") from None
        account.remarks |= dict.fromkeys(str(w.message) for w in said)
        if isinstance(found, Outcome):
            account.note(found.notes)
            found = found.value
        there = [row[part.lora] for part in parts if part.pair.rank]
        pair, cut, size = _of_rank(found, rank, ceiling(there))
        if size:
            account.cuts.add(module, cut, size)
        if not pair.rank:
            continue
        scale = math.fsum(abs(part.weight) * part.pair.norm() for part in parts)
        account.gaps.compare(module, pair, exact, scale)
        shape = max((update.shape for update in there), key=len)
        updates[module] = baked(pair, shape, dtype, account.remarks)
    recipe: dict[str, Any] = {"method": title, "rank": rank, "seed": seed, "options": values}
    recipe |= {"loras": [lora.name for lora, _ in used], "weights": [w for _, w in used]}
    metadata = inherited([lora for lora, _ in used])
    metadata["modelspec.merged_from"] = ",".join(lora.name for lora, _ in used)
    metadata["cmlora.merge"] = json.dumps(recipe, sort_keys=True)
    triggers = dict.fromkeys(word for lora, _ in used for word in lora.triggers)
    merged = LoRA(name or "+".join(recipe["loras"]), updates, metadata, tuple(triggers))
    return MergeResult(merged, account.report(title, method.kind, updates))


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


def _table(used: Sequence[tuple[LoRA, float]]) -> dict[str, dict[int, Update]]:
    """By module and number of the LoRA what is done to it."""
    table: dict[str, dict[int, Update]] = {}
    for module in sorted({module for lora, _ in used for module in lora.updates}):
        every = enumerate(lora.updates.get(module) for lora, _ in used)
        row = {i: update for i, update in every if update is not None}
        check_shape(module, [(used[i][0].name, update) for i, update in row.items()])
        table[module] = row
    return table


def _parts(
    row: Mapping[int, Update], used: Sequence[tuple[LoRA, float]], absent: bool = False
) -> list[_Part]:
    """What is done to a module, when updates of zero are treated like missing ones.

    Nothing if no LoRA changes it; with ``absent`` those that do not are there with rank 0.
    """
    pairs = {i: Pair(*update.factors()) for i, update in row.items()}
    there = {i: pair for i, pair in pairs.items() if pair.norm() > NOTHING}
    if not there:
        return []
    first = next(iter(there.values()))
    empty = Pair(first.up[:, :0], first.down[:0])
    wanted = range(len(used)) if absent else sorted(there)
    return [_Part(i, there.get(i, empty), used[i][1]) for i in wanted]


def _whole(
    table: Mapping[str, Mapping[int, Update]], used: Sequence[tuple[LoRA, float]]
) -> Iterator[dict[int, Pair]]:
    """Every module's pairs by number of the LoRA, one module at a time."""
    for row in table.values():
        if parts := _parts(row, used):
            yield {part.lora: part.pair for part in parts}


def _gram(title: str, grams: Grams | None, name: str, module: str) -> Tensor:
    try:
        return (grams or {})[name][module].double()
    except KeyError:
        raise CmloraError(
            f"{title} needs calibration data, and there is none of {name} for {module}"
        ) from None


def _of_rank(found: Pair | Tensor, rank: int | None, most: int) -> tuple[Pair, float, float]:
    """Factors of a rank; their distance from what was found, and its norm, 0 where nothing is cut.

    A dense matrix is always cut: what it loses may be little, but is never known before.
    """
    if isinstance(found, Tensor):
        pair = nearest(found, min(rank or most, most))
        size = dense_norm(found)
    elif rank is not None and found.rank > rank:
        pair, size = truncate(found, rank), found.norm()
    else:
        return found, 0.0, 0.0
    return pair, math.sqrt(max(0.0, size**2 - pair.norm() ** 2)), size
