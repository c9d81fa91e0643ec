"""What is known of the LoRAs in a model without running it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer

from cmlora.gating import gateable

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Updates:
    """A set of LoRAs in a model.

    Args:
        plain: whether all its adapters are plain LoRAs; otherwise nothing else is known.
        sizes: norm of every LoRA's update at strength 1, over all layers; empty if the weights
            cannot be read.
    """

    plain: bool = True
    sizes: Mapping[str, float] = field(default_factory=dict)


def updates(models: Iterable[nn.Module], names: Sequence[str]) -> Updates:
    """Measure LoRAs that are loaded: |B A|^2 = sum of (B^T B) * (A A^T), so no update is formed.

    Args:
        models: denoisers with injected adapters.
        names: the LoRAs that take part.
    """
    modules = (module for model in models for module in model.modules())
    found: list[Any] = [module for module in modules if isinstance(module, BaseTunerLayer)]
    if not all(map(gateable, found)):
        return Updates(plain=False)
    squares = dict.fromkeys(names, 0.0)
    for layer in found:
        for name in names:
            if name not in layer.lora_A:
                continue
            down = layer.lora_A[name].weight.detach().flatten(1).float()
            if down.is_meta:  # offloaded: read only while it is called
                return Updates()
            up = _scaled(layer, name).float()
            squares[name] += float(((up.mT @ up) * (down @ down.mT)).sum())
    return Updates(True, {name: max(square, 0.0) ** 0.5 for name, square in squares.items()})


def _scaled(layer: Any, name: str) -> Tensor:
    """A LoRA's up factor at strength 1, (C, r)."""
    rank: float = layer.r[name]
    usual = layer.lora_alpha[name] / (rank**0.5 if layer.use_rslora.get(name) else rank)
    up: Tensor = layer.lora_B[name].weight.detach().flatten(1) * usual
    return up
