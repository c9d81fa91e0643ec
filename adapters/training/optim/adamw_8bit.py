"""AdamW with moments in 8 bits, by whichever library is installed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch.optim import Optimizer

from cmlora.errors import CmloraError


def adamw_8bit(
    params: Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimizer:
    """AdamW of bitsandbytes (on CUDA) or of torchao.

    Raises:
        CmloraError: if neither is installed.
    """
    options: dict[str, Any] = {
        "betas": (float(betas[0]), float(betas[1])),
        "eps": eps,
        "weight_decay": weight_decay,
    }
    if torch.cuda.is_available() and find_spec("bitsandbytes"):
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
    elif find_spec("torchao"):
        from torchao.optim import AdamW8bit  # type: ignore[import-not-found]
    else:
        raise CmloraError(
            "train: adamw_8bit needs bitsandbytes (CUDA) or torchao; pip install one of them, or "
            "use galore or frugal, which save more"
        )
    made: Optimizer = AdamW8bit(params, lr=lr, **options)
    return made
