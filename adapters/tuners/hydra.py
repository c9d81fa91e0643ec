"""Hydra: a parallel low-rank branch, and a sequential one on what the layer puts out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, cat

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.tensors import kaiming
from cmlora.errors import CmloraError


@dataclass
class HydraConfig(TunerConfig):
    """Settings of Hydra; ``r`` is the rank of the parallel branch.

    Args:
        sequential_r: rank of the sequential branch; 0 leaves an ordinary LoRA.
    """

    r: int = 2
    sequential_r: int = 2
    method: ClassVar[str] = "hydra"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequential_r < 0:
            raise CmloraError(f"hydra: sequential_r is {self.sequential_r}, not 0 or more")


class HydraLayer(TunerLayer):
    """``B_p A_p + B_s A_s W`` for the weight and ``B_s A_s b`` for the bias.

    arXiv:2309.06922. The second term recombines what the layer already puts out, so its rows stay
    in the row space of the weight; it is formed from the weight without any adapter.
    """

    method = "hydra"
    trained = ("down", "up", "after_down", "after_up")

    def start(self, name: str) -> dict[str, Tensor]:
        outputs, inputs = self.matrix().shape
        rank, after, random = self.r[name], self.config[name].sequential_r, self.random(name)
        return {
            "down": kaiming(rank, inputs, random),
            "up": torch.zeros(outputs, rank),
            "after_down": kaiming(after, outputs, random),
            "after_up": torch.zeros(outputs, after),
        }

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        up, down, after_up, after_down = self._tensors(name)
        return cat([up, after_up], 1), cat([down, after_down @ self.matrix()])

    def bias_update(self, name: str) -> Tensor | None:
        bias = self.vector()
        _, _, after_up, after_down = self._tensors(name)
        return None if bias is None else after_up @ (after_down @ bias)

    def _tensors(self, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        up, down = self.tensor(name, "up"), self.tensor(name, "down")
        return up, down, self.tensor(name, "after_up"), self.tensor(name, "after_down")
