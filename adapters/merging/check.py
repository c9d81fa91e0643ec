"""Whether LoRAs can be put together at all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cmlora import family
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update


def check_values(loras: Sequence[LoRA]) -> None:
    """Raises `CmloraError` for a tensor with NaN or infinity, or LoRAs for different models."""
    families: dict[str, str] = {}
    for lora in loras:
        for module, update in lora.updates.items():
            for role in ("down", "up", "mid"):
                tensor = getattr(update, role)
                if tensor is not None and not torch.isfinite(tensor).all():
                    raise CmloraError(f"{lora.name}: {module} ({role}) holds NaN or infinity")
            if not math.isfinite(update.scale):
                raise CmloraError(f"{lora.name}: the scale of {module} is {update.scale}")
        families.setdefault(family.of_lora(lora), lora.name)
    families.pop(family.UNKNOWN, None)
    transformers = [found for found in families if not _unet(found)]
    if len(transformers) > 1:  # one of them may be the other
        families.pop(family.TRANSFORMER, None)
    if len(families) > 1:
        each = ", ".join(f"{name} is for {found}" for found, name in families.items())
        raise CmloraError(f"these LoRAs are for different models: {each}")


def _unet(found: str) -> bool:
    """Whether a family's denoiser is a UNet."""
    return found.startswith(("a UNet", *family.UNETS))


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
