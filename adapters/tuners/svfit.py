"""SVFit: the leading singular values of the weight are trained, its singular vectors are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.tensors import svd


@dataclass
class SvfitConfig(TunerConfig):
    """Settings of SVFit.

    Args:
        energy: choose for each layer the smallest number of values, but no more than ``r``, that
            hold this share of the squared norm; ``None`` is always ``r``.
    """

    r: int = 768
    energy: float | None = None
    method: ClassVar[str] = "svfit"


class SvfitLayer(TunerLayer):
    """``U_r diag(z) V_r^T`` with ``W = U S V^T`` and ``z`` (R,) the change of ``S``, from zero.

    arXiv:2409.05926, as an update: what is trained is the difference from the singular values.
    """

    method = "svfit"
    trained = ("values",)

    def start(self, name: str) -> dict[str, Tensor]:
        return {"values": torch.zeros(self.frozen(name, "up").shape[1])}

    def constants(self, name: str) -> dict[str, Tensor]:
        config, matrix = self.config[name], self.matrix()
        left, values, right = svd(matrix, min(matrix.shape))
        rank = config.r
        if config.energy is not None:
            share = values.square().cumsum(0) / values.square().sum()
            rank = min(rank, int((share < config.energy - 1e-7).sum()) + 1)
        return {"up": left[:, :rank], "down": right[:rank]}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        values = self.tensor(name, "values")
        return self.frozen(name, "up").to(values) * values, self.frozen(name, "down").to(values)
