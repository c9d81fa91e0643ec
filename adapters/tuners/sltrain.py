"""SLTrain: a low-rank update and a sparse one on a random support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.tensors import kaiming
from cmlora.errors import CmloraError


@dataclass
class SltrainConfig(TunerConfig):
    """Settings of SLTrain.

    Args:
        density: share of the entries in the support of the sparse update.
    """

    r: int = 128
    alpha: float | None = 32
    density: float = 0.03
    method: ClassVar[str] = "sltrain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.density <= 1:
            raise CmloraError(f"sltrain: density is {self.density}, not from 0 to 1")


class SltrainLayer(TunerLayer):
    """``B A + S`` with ``floor(density O I)`` values of ``S`` at places that the seed decides.

    arXiv:2406.02214, beside a weight that stays instead of in its place, so ``S`` too starts at
    zero. The strength alpha / r belongs to ``B A``; a weight multiplies both.
    """

    method = "sltrain"
    trained = ("down", "up", "values")

    def start(self, name: str) -> dict[str, Tensor]:
        outputs, inputs = self.matrix().shape
        down = kaiming(self.r[name], inputs, self.random(name))
        up = torch.zeros(outputs, self.r[name])
        return {"down": down, "up": up, "values": torch.zeros(len(self.frozen(name, "places")))}

    def constants(self, name: str) -> dict[str, Tensor]:
        entries = self.matrix().numel()
        count = int(self.config[name].density * entries)
        places = torch.randperm(entries, generator=self.random(name))[:count]
        return {"places": places.sort().values}

    def update(self, name: str) -> Tensor:
        values = self.tensor(name, "values") / self.initial[name]
        sparse = values.new_zeros(self.matrix().numel())
        sparse = sparse.index_add(0, self.frozen(name, "places"), values)
        low = self.tensor(name, "up") @ self.tensor(name, "down")
        return low + sparse.reshape(low.shape)
