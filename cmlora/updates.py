"""How large the updates of LoRAs in a model are, and how much they overlap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from cmlora.gating import gateable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


@dataclass(frozen=True)
class Overlap:
    """What is known of a set of LoRAs in a model.

    Args:
        plain: whether all its adapters are plain LoRAs; otherwise nothing else is known.
        sizes: norm of every LoRA's update at strength 1, over all layers.
        interference: largest absolute cosine between two of the updates; ``None`` if it is not
            known.
    """

    plain: bool = True
    sizes: Mapping[str, float] = field(default_factory=dict)
    interference: float | None = None


def overlap(models: Iterable[nn.Module], names: Sequence[str]) -> Overlap:
    """Measure LoRAs that are loaded, by inner products of their factors.

    <B_i A_i, B_j A_j> = sum of (B_i^T B_j) * (A_i A_j^T), so that no update is formed.

    Args:
        models: denoisers with injected adapters.
        names: the LoRAs that take part.
    """
    found: list[Any] = [
        m for model in models for m in model.modules() if isinstance(m, BaseTunerLayer)
    ]
    if not all(map(gateable, found)):
        return Overlap(plain=False)
    total = torch.zeros(len(names), len(names), dtype=torch.float64)
    for layer in found:
        held = [i for i, name in enumerate(names) if name in layer.lora_A]
        if not held:
            continue
        downs = [layer.lora_A[names[i]].weight.detach().flatten(1) for i in held]
        ups = [_scaled(layer, names[i]) for i in held]
        if downs[0].is_meta:  # offloaded: read only while it is called
            return Overlap()
        ranks = [len(down) for down in downs]
        a, b = torch.cat(downs).float(), torch.cat(ups, 1).float()
        products = (b.mT @ b) * (a @ a.mT)
        sums = torch.stack([part.sum(0) for part in torch.split_with_sizes(products, ranks)])
        parts = torch.split_with_sizes(sums, ranks, 1)
        gram = torch.stack([part.sum(1) for part in parts], 1)
        total[torch.tensor(held)[:, None], torch.tensor(held)] += gram.double().cpu()
    sizes = total.diagonal().clamp_min(0).sqrt()
    between = total / (sizes[:, None] * sizes).clamp_min(torch.finfo(torch.float64).tiny)
    between = between.fill_diagonal_(0).abs()
    largest = float(between.max()) if len(names) > 1 else None
    return Overlap(True, dict(zip(names, sizes.tolist(), strict=True)), largest)


def _scaled(layer: Any, name: str) -> Tensor:
    """A LoRA's up factor at strength 1, (C, r)."""
    rank: float = layer.r[name]
    usual = layer.lora_alpha[name] / (rank**0.5 if layer.use_rslora.get(name) else rank)
    up: Tensor = layer.lora_B[name].weight.detach().flatten(1) * usual
    return up
