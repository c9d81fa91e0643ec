"""Orthogonal Adaptation: concepts get disjoint directions, so that their sum keeps them apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.tensors import generator
from cmlora.errors import CmloraError


@dataclass
class OrthogonalConfig(TunerConfig):
    """Settings of Orthogonal Adaptation; concepts to be combined share ``seed`` and ``r``.

    Args:
        slot: which of the directions the concept gets; a different number for each concept.
    """

    slot: int = 0
    method: ClassVar[str] = "orthogonal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slot < 0:
            raise CmloraError(f"orthogonal: slot is {self.slot}, not 0 or more")


class OrthogonalLayer(TunerLayer):
    """``B A`` with ``A`` (R, I) the slot's rows of one random orthogonal matrix, training ``B``.

    arXiv:2312.02432. The matrix depends on the seed and the number of inputs alone. Updates of
    different slots have inner product zero, and each does nothing to the directions of the other.
    """

    method = "orthogonal"
    trained = ("up",)

    def start(self, name: str) -> dict[str, Tensor]:
        rank = len(self.frozen(name, "down"))  # refuses a slot that there is not
        return {"up": torch.zeros(self.matrix().shape[0], rank)}

    def constants(self, name: str) -> dict[str, Tensor]:
        config, inputs = self.config[name], self.matrix().shape[1]
        end = (config.slot + 1) * config.r
        if end > inputs:
            raise CmloraError(
                f"orthogonal: a layer with {inputs} inputs has room for {inputs // config.r} "
                f"slots of rank {config.r}, and slot {config.slot} is not one of them"
            )
        random = generator(config.seed)
        square, triangle = torch.linalg.qr(
            torch.randn(inputs, inputs, generator=random, dtype=torch.float64)
        )
        square = square * triangle.diagonal().sign()
        return {"down": square[:, end - config.r : end].T.float()}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        up = self.tensor(name, "up")
        return up, self.frozen(name, "down").to(up)
