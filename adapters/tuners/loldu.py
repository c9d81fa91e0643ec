"""LoLDU: the diagonal between triangular factors of the weight is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig


@dataclass
class LolduConfig(TunerConfig):
    """Settings of LoLDU."""

    alpha: float | None = 1.0
    method: ClassVar[str] = "loldu"


class LolduLayer(TunerLayer):
    """``P L_r diag(z) U_r`` with ``W = P L D U`` and ``z`` (R,) the change of ``D``, from zero.

    arXiv:2410.13618, as an update: what is trained is the difference of the diagonal from its
    start. L and U are unit triangular, in pivot order, and computed again from the weight. A row
    whose pivot is zero cannot be scaled to one and is left out.
    """

    method = "loldu"
    trained = ("diagonal",)

    def start(self, name: str) -> dict[str, Tensor]:
        return {"diagonal": torch.zeros(min(self.r[name], *self.matrix().shape))}

    def constants(self, name: str) -> dict[str, Tensor]:
        rank = self.r[name]
        permutation, lower, upper = torch.linalg.lu(self.matrix())
        pivots = upper.diagonal()[:rank]
        usable = pivots.abs() > 1e-12
        inverse = torch.where(usable, pivots, torch.ones_like(pivots)).reciprocal() * usable
        return {"up": permutation @ lower[:, :rank], "down": inverse[:, None] * upper[:rank]}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        diagonal = self.tensor(name, "diagonal")
        return self.frozen(name, "up").to(diagonal) * diagonal, self.frozen(name, "down").to(
            diagonal
        )
