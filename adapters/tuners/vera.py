"""VeRA: two frozen random factors that all layers share, with two trained vectors per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.tensors import generator, uniform


@dataclass
class VeraConfig(TunerConfig):
    """Settings of VeRA.

    Args:
        start_scale: of the trained vector between the factors.
    """

    r: int = 256
    start_scale: float = 0.1
    method: ClassVar[str] = "vera"


class VeraLayer(TunerLayer):
    """``diag(b) B diag(d) A`` with ``b`` (O,) from zero and ``d`` (R,) from 0.1.

    arXiv:2310.11454. ``A`` (R, I) and ``B`` (O, R) are the first columns and rows of matrices that
    depend on the seed alone: layers share them through the seed and not through memory, so an
    adapter can be injected into any model, saved and deleted by itself.
    """

    method = "vera"
    trained = ("output", "inner")

    def start(self, name: str) -> dict[str, Tensor]:
        config = self.config[name]
        inner = torch.full((config.r,), float(config.start_scale))
        return {"output": torch.zeros(self.matrix().shape[0]), "inner": inner}

    def constants(self, name: str) -> dict[str, Tensor]:
        outputs, inputs = self.matrix().shape
        rank, seed = self.r[name], self.config[name].seed
        bound = (3 / inputs) ** 0.5, (3 / rank) ** 0.5
        # Drawn a column at a time, so that a wider layer's matrix begins with this one.
        down = uniform((inputs, rank), bound[0], generator(2 * seed)).T
        return {"down": down, "up": uniform((outputs, rank), bound[1], generator(2 * seed + 1))}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        output, inner = self.tensor(name, "output"), self.tensor(name, "inner")
        up, down = self.frozen(name, "up").to(output), self.frozen(name, "down").to(inner)
        return output[:, None] * up, inner[:, None] * down
