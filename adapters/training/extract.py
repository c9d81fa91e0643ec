"""The difference between two denoisers as a LoRA of chosen rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update

_NOTHING = 1e-7


@dataclass(frozen=True)
class Extracted:
    """A LoRA and what it lacks.

    Args:
        lora: the difference of all linear layers and convolutions.
        error: norm of what the rank cannot hold, as a share of the norm of the difference.
        left: names of other parameters that differ, for which a LoRA has no place.
        share: norm of their difference as a share of the whole difference's.
    """

    lora: LoRA
    error: float
    left: tuple[str, ...]
    share: float


@torch.no_grad()
def extract(
    base: nn.Module,
    tuned: nn.Module,
    rank: int,
    part: str = "unet",
    name: str = "extracted",
    metadata: dict[str, str] | None = None,
) -> Extracted:
    """The best approximation of ``tuned - base`` of a rank, layer by layer (Eckart-Young).

    Args:
        base: the denoiser before training.
        tuned: the one after; it has the same layers.
        rank: of each layer at most; a layer that needs less gets less.
        part: of the pipeline that they are.
        name: of the LoRA.
        metadata: of its file.

    Raises:
        CmloraError: if the two are not the same kind of model, or do not differ.
    """
    if rank < 1:
        raise CmloraError(f"extract: rank is {rank}, not 1 or more")
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    if before.keys() != after.keys() or any(before[k].shape != after[k].shape for k in before):
        other = next(
            (k for k in sorted(before.keys() | after.keys()) if not _same(k, before, after)), ""
        )
        raise CmloraError(f"extract: the models are not of one kind: {other} differs in shape")
    layers = {
        f"{key}.weight": key
        for key, layer in base.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }
    updates: dict[str, Update] = {}
    left: list[str] = []
    lost = held = outside = 0.0
    for key, old in before.items():
        delta = after[key].double() - old.double()
        norm = float(delta.norm())
        if norm <= _NOTHING * float(old.double().norm()):
            continue
        if key in layers:
            update, missing = best(delta, rank)
            updates[f"{part}.{layers[key]}"] = update
            lost, held = lost + missing**2, held + norm**2
        else:
            left.append(key)
            outside += norm**2
    if not updates:
        raise CmloraError("extract: the two models have the same linear layers and convolutions")
    lora = LoRA(name, updates, metadata or {})
    share = math.sqrt(outside / (outside + held))
    return Extracted(lora, math.sqrt(lost / held), tuple(left), share)


def best(delta: Tensor, rank: int) -> tuple[Update, float]:
    """The nearest update of a rank, and the norm of the difference to it."""
    left, values, right = torch.linalg.svd(delta.double().flatten(1), full_matrices=False)
    keep = max(1, min(rank, int((values > 1e-6 * values[0]).sum())))
    root = values[:keep].sqrt()
    down = (root[:, None] * right[:keep]).float().reshape(keep, *delta.shape[1:])
    up = (left[:, :keep] * root).float().contiguous()
    return Update(down.contiguous(), up), float(values[keep:].norm())


def _same(key: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    return key in before and key in after and before[key].shape == after[key].shape
