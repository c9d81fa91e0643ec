"""LoRA-XS: a small trained matrix between frozen singular vectors of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.tensors import svd


@dataclass
class LoraXsConfig(TunerConfig):
    """Settings of LoRA-XS.

    Args:
        start_std: of the trained matrix; the paper's 1e-5 makes a start that is zero for every
            practical purpose, 0 one that is exactly zero and trains as well.
    """

    start_std: float = 0.0
    method: ClassVar[str] = "lora_xs"


class LoraXsLayer(TunerLayer):
    """``U_r M S_r V_r^T`` with the leading singular triplets of the weight, training ``M`` (R, R).

    arXiv:2405.17604. R^2 numbers per layer, whatever its size; the frozen factors are computed
    again from the weight after loading.
    """

    method = "lora_xs"
    trained = ("core",)

    def start(self, name: str) -> dict[str, Tensor]:
        rank = min(self.r[name], *self.matrix().shape)
        noise = torch.randn(rank, rank, generator=self.random(name))
        return {"core": noise * self.config[name].start_std}

    def constants(self, name: str) -> dict[str, Tensor]:
        left, values, right = svd(self.matrix(), self.r[name])
        left, right = fixed_signs(left, right)
        return {"up": left, "down": values[:, None] * right}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        core = self.tensor(name, "core")
        return self.frozen(name, "up").to(core), core @ self.frozen(name, "down").to(core)


def fixed_signs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Singular vectors whose largest entry on the left is positive; libraries differ in signs."""
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))  # (1, R)
    signs = torch.where(largest < 0, -1.0, 1.0).to(left)
    return left * signs, right * signs.T
