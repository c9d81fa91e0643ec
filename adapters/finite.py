"""Weights that a computation can start from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cmlora.errors import CmloraError


def check_finite(tensors: Mapping[str, Tensor], whose: object) -> None:
    """Raises `CmloraError`, naming the file and the key, if a tensor holds NaN or infinity."""
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CmloraError(f"{whose}: {key} holds NaN or infinity")
