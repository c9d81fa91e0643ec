"""Layers that are one matrix in a file and several in diffusers' model, and the way between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cmlora.lora import Update
from cmlora.originals import Target


def sizes(target: Target, outputs: int, inputs: int) -> list[int]:
    """How many outputs each module has, as far as the shape of the whole tells.

    Queries are as wide as the inputs, keys and values equally wide, and a fourth module has the
    rest.

    Raises:
        ValueError: if the outputs cannot be shared like that.
    """
    count = len(target.modules)
    if count == 1:
        return [outputs]
    if count == 3 and outputs > inputs and outputs != 3 * inputs and (outputs - inputs) % 2 == 0:
        return [inputs, *[(outputs - inputs) // 2] * 2]
    if count == 3 and outputs % 3 == 0:
        return [outputs // 3] * 3
    if count == 4 and outputs > 3 * inputs:
        return [inputs] * 3 + [outputs - 3 * inputs]
    raise ValueError(f"{outputs} outputs of {inputs} inputs cannot be shared by {target.name}")


def swapped(rows: Tensor, target: Target, inputs: int) -> Tensor:
    """The rows of a tensor (O, ...) in diffusers' order, or back: it is its own inverse.

    Only layers with as many outputs for scale as for shift, and none for gates, differ.
    """
    if not target.swapped or len(rows) != 2 * inputs:
        return rows
    first, second = rows.chunk(2)
    return torch.cat([second, first])


def share(update: Update, target: Target, given: Sequence[int] | None = None) -> dict[str, Update]:
    """An update of a whole layer as updates of its modules.

    They have the same ``down``. Rank units that add nothing to a module are left out, which
    undoes the stacking of updates that were trained apart.

    Args:
        update: of the file's layer.
        target: the modules.
        given: their outputs; by default what `sizes` says.

    Raises:
        ValueError: if the outputs do not fit.
    """
    outputs, inputs = update.shape[:2]
    up = swapped(update.up, target, inputs)
    widths = list(given) if given is not None else sizes(target, outputs, inputs)
    if sum(widths) != outputs:
        raise ValueError(f"{outputs} outputs for {target.name}, which has {sum(widths)}")
    if len(widths) == 1:
        return {target.modules[0]: replace(update, up=up)}
    found = {}
    for module, rows in zip(target.modules, torch.split(up, widths), strict=True):
        used = (rows != 0).any(0)
        if update.mid is None and bool(used.any()) and not bool(used.all()):
            found[module] = replace(update, down=update.down[used], up=rows[:, used])
        else:
            found[module] = replace(update, up=rows.clone())
    return found
