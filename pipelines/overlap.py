"""How large the updates of LoRA files are and how much they overlap, without a model."""

from collections.abc import Mapping
from pathlib import Path

import torch

from cmlora.adapters.analysis.alignment import cosines, gram
from cmlora.adapters.analysis.balance import sizes
from cmlora.errors import CmloraError
from cmlora.files import read
from cmlora.lora import DENOISERS


def overlap(paths: Mapping[str, Path]) -> tuple[dict[str, float], float | None]:
    """Norms of the updates by name, and the largest absolute cosine between two of them.

    Args:
        paths: LoRA files by name.

    Returns:
        nothing and ``None`` if a file is no LoRA by factors, such as a full-rank update.
    """
    try:
        tables = gram([read(path) for path in paths.values()])
    except CmloraError:
        return {}, None
    inside = [t for block, t in tables.items() if block.partition(".")[0] in DENOISERS]
    if not inside:
        return {}, None
    between = cosines(torch.stack(inside).sum(0)).fill_diagonal_(0).abs()
    return dict(zip(paths, sizes(tables), strict=True)), float(between.max())
