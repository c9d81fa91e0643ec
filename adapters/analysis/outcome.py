"""What a merge or a compression did, block by block, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cmlora.adapters.analysis.heatmap import Heatmap
from cmlora.adapters.merging.run import block
from cmlora.lora import LoRA


def of_merge(
    title: str, merged: LoRA, sources: Sequence[LoRA], errors: Mapping[str, float] | None = None
) -> Heatmap:
    """How much of every LoRA is in a merged one: cosines by block (rows) and LoRA (columns).

    Args:
        title: above.
        merged: the result.
        sources: what it was made of.
        errors: by block, distance from the exact weighted sum relative to it; a column of its own.
    """
    modules = {module for lora in sources for module in lora.updates} | set(merged.updates)
    blocks = sorted({block(module) for module in modules})
    rows = []
    for where in blocks:
        here, *there = (_within(lora, where) for lora in (merged, *sources))
        lost = [] if errors is None else [errors.get(where, math.nan)]
        rows.append((*lost, *(here.cosine(own) for own in there)))
    columns = (*([] if errors is None else ["distance"]), *(lora.name for lora in sources))
    return Heatmap(title, tuple(blocks), columns, tuple(rows))


def of_compression(
    title: str, modules: Mapping[str, tuple[float, float, float]], what: str
) -> Heatmap:
    """What is left and what is lost: means by block (rows) of the share kept and the error.

    Args:
        title: above.
        modules: by name, the size before and after, and the error relative to the matrix.
        what: the size is called: rank or bytes.
    """
    blocks: dict[str, list[tuple[float, float, float]]] = {}
    for module, row in sorted(modules.items()):
        blocks.setdefault(block(module), []).append(row)
    values = []
    for rows in blocks.values():
        before, after = (sum(row[k] for row in rows) for k in (0, 1))
        errors = [row[2] ** 2 for row in rows]
        values.append((after / before if before else 1.0, math.sqrt(sum(errors) / len(errors))))
    return Heatmap(title, tuple(blocks), (f"{what} kept", "error"), tuple(values))


def _within(lora: LoRA, where: str) -> LoRA:
    return LoRA(lora.name, {m: u for m, u in lora.updates.items() if block(m) == where})
