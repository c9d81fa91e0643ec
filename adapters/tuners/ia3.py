"""(IA)^3: the outputs of a layer, or its inputs, are rescaled one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.errors import CmloraError


@dataclass
class Ia3Config(TunerConfig):
    """Settings of (IA)^3; ``r`` is not used.

    Args:
        side: "output" for keys and values, "input" for the second layer of a feed-forward.
    """

    side: str = "output"
    method: ClassVar[str] = "ia3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in ("input", "output"):
            raise CmloraError(f"ia3: side is {self.side!r}, not 'input' or 'output'")


class Ia3Layer(TunerLayer):
    """``diag(l) W`` and ``l b``, or ``W diag(l)``, with l the rescaling minus one, from zero.

    arXiv:2205.05638, as an update: several adapters add up instead of multiplying.
    """

    method = "ia3"
    trained = ("scale",)

    def start(self, name: str) -> dict[str, Tensor]:
        shape = self.get_base_layer().weight.shape
        return {"scale": torch.zeros(shape[0 if self.config[name].side == "output" else 1])}

    def update(self, name: str) -> Tensor:
        matrix, scale = self.matrix(), self.tensor(name, "scale")
        if self.config[name].side == "output":
            return scale[:, None] * matrix
        return matrix * scale.repeat_interleave(matrix.shape[1] // len(scale))

    def bias_update(self, name: str) -> Tensor | None:
        bias = self.vector()
        if bias is None or self.config[name].side == "input":
            return None
        return self.tensor(name, "scale") * bias
