"""BOFT: rotations in butterfly order, so that few blocks connect all inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.oft import cayley
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.errors import CmloraError


@dataclass
class BoftConfig(TunerConfig):
    """Settings of BOFT; ``r`` is the size of a block.

    Args:
        count: of the factors; the k-th mixes inputs that are r^k apart.
    """

    r: int = 2
    count: int = 2
    method: ClassVar[str] = "boft"


class BoftLayer(TunerLayer):
    """``diag(1 + s) W R_1 ... R_m - W`` with orthogonal R_k, each of blocks of size b.

    arXiv:2311.06243. The blocks are Cayley transforms as in OFT. The trained scale s of every
    output starts at zero and acts on the weight alone.
    """

    method = "boft"
    trained = ("skew", "scale")

    def start(self, name: str) -> dict[str, Tensor]:
        outputs, inputs = self.matrix().shape
        size, count = self.r[name], self.config[name].count
        if inputs % size**count:
            raise CmloraError(f"boft: {inputs} inputs are no multiple of {size}^{count}")
        skew = torch.zeros(count, inputs // size, size * (size - 1) // 2)
        return {"skew": skew, "scale": torch.zeros(outputs)}

    def update(self, name: str) -> Tensor:
        matrix, size = self.matrix(), self.r[name]
        turned = matrix
        for order, upper in enumerate(self.tensor(name, "skew")):
            apart = size**order
            blocks = cayley(upper, size).reshape(-1, apart, size, size)
            parts = turned.reshape(len(matrix), -1, size, apart)
            turned = torch.einsum("okia,kaij->okja", parts, blocks.to(matrix))
            turned = turned.reshape(matrix.shape)
        return turned * (1 + self.tensor(name, "scale"))[:, None] - matrix
