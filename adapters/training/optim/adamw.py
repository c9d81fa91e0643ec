"""AdamW, by torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import AdamW


def adamw(
    params: Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101); ``2 O I`` numbers per matrix."""
    pair = (float(betas[0]), float(betas[1]))
    return AdamW(params, lr, betas=pair, eps=eps, weight_decay=weight_decay)
