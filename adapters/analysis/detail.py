"""A guess, from the file alone, at which LoRA draws detail and which draws layout."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

_LEVEL = re.compile(r"unet\.(down|up)_blocks\.(\d+)$")


def detail(tables: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Where each LoRA's energy sits in the UNet: 1 at full resolution, 0 at the lowest.

    Args:
        tables: see `cmlora.adapters.analysis.alignment.gram`.

    Returns:
        By LoRA; NaN if it changes no block of a UNet, or the UNet has one resolution only.
    """
    levels = {block: match for block in tables if (match := _LEVEL.fullmatch(block))}
    deepest = max((int(match[2]) for match in levels.values()), default=0)
    count = len(next(iter(tables.values()))) if tables else 0
    if not deepest:
        return (math.nan,) * count
    heights = {
        block: (deepest - int(m[2]) if m[1] == "down" else int(m[2])) / deepest
        for block, m in levels.items()
    }
    heights |= {block: 0.0 for block in tables if block.startswith("unet.mid_block")}
    whole = sum(float(tables[b].diagonal().sum()) for b in heights)
    if not whole:
        return (math.nan,) * count
    found = []
    for index in range(count):
        energy = {block: float(tables[block][index, index]) for block in heights}
        total = math.fsum(energy.values())
        high = math.fsum(heights[block] * value for block, value in energy.items())
        found.append(high / total if total > 0 else math.nan)
    return tuple(found)
