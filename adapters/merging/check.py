"""Whether LoRAs can be put together at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from cmlora import family
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update, full

NOTHING = 1e-30
"""Updates with a smaller norm vanish in single precision."""


def check_values(loras: Sequence[LoRA]) -> None:
    """Raises `CmloraError` for a tensor with NaN or infinity, or LoRAs for different models."""
    families: dict[str, str] = {}
    for lora in loras:
        for module, update in lora.updates.items():
            for role in ("down", "up", "mid"):
                tensor = getattr(update, role)
                if tensor is not None and not torch.isfinite(full(tensor)).all():
                    raise CmloraError(f"{lora.name}: {module} ({role}) holds NaN or infinity")
            if not math.isfinite(update.scale):
                raise CmloraError(f"{lora.name}: the scale of {module} is {update.scale}")
        families.setdefault(family.of_lora(lora), lora.name)
    if len(family.distinct(families)) > 1:
        named = [found for found in families if found != family.UNKNOWN]
        each = ", ".join(f"{families[found]} is for {found}" for found in named)
        raise CmloraError(f"these LoRAs are for different models: {each}")


def check_shape(module: str, named: Sequence[tuple[str, Update]]) -> None:
    """Raises `CmloraError` unless all updates fit one layer.

    A 1x1 convolution is a matrix in some files and a kernel in others.
    """
    sizes: dict[tuple[int, ...], str] = {}
    for name, update in named:
        sizes.setdefault((*update.shape[:2], *(update.shape[2:] or (1, 1))), name)
    if len(sizes) > 1:
        each = " and ".join(f"{shape} in {name}" for shape, name in sizes.items())
        raise CmloraError(f"these LoRAs are for different models: {module} is {each}")


def ceiling(updates: Sequence[Update]) -> int:
    """The largest rank that the weighted sum of updates of one module can have."""
    rows, columns, *kernel = updates[0].shape
    return min(rows, columns * math.prod(kernel), sum(update.rank for update in updates))


def check_rank(rank: int | None, modules: Iterable[Sequence[Update]]) -> None:
    """Raises `CmloraError` for a rank that no module's weighted sum can have.

    Args:
        rank: of a result; nothing is asked for if not given.
        modules: the updates of all LoRAs, module by module.
    """
    most = max(map(ceiling, modules), default=1)
    if rank is not None and not 1 <= rank <= most:
        raise CmloraError(f"rank {rank} is not possible; these LoRAs allow 1 to {most}")
