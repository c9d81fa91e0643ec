"""OFT: the inputs of the weight are rotated, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig


@dataclass
class OftConfig(TunerConfig):
    """Settings of OFT; ``r`` is the size of a block, or the next smaller divisor of the inputs."""

    r: int = 32
    method: ClassVar[str] = "oft"


class OftLayer(TunerLayer):
    """``W R^T - W`` with R block-diagonal and orthogonal by Cayley, ``(I - Q)(I + Q)^-1``.

    arXiv:2306.07280. The skew-symmetric Q starts at zero, its upper half is trained. R acts on the
    flattened weight and not on unfolded pictures, so convolutions are exact. At a weight between
    0 and 1 the update, not the angle, is scaled.
    """

    method = "oft"
    trained = ("skew",)

    def start(self, name: str) -> dict[str, Tensor]:
        inputs = self.matrix().shape[1]
        size = divisor(inputs, self.r[name])
        return {"skew": torch.zeros(inputs // size, size * (size - 1) // 2)}

    def update(self, name: str) -> Tensor:
        matrix = self.matrix()
        blocks = cayley(self.tensor(name, "skew"), divisor(matrix.shape[1], self.r[name]))
        parts = matrix.reshape(len(matrix), *blocks.shape[:2])  # (O, blocks, size)
        turned = torch.einsum("obi,bji->obj", parts, blocks.to(matrix))
        return turned.reshape(matrix.shape) - matrix


def cayley(upper: Tensor, size: int) -> Tensor:
    """Orthogonal (blocks, size, size) from the upper halves of skew-symmetric matrices."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    skew = upper.new_zeros(len(upper), size, size)
    skew = skew.index_put((torch.arange(len(upper))[:, None], rows, columns), upper)
    skew = skew - skew.transpose(1, 2)
    one = torch.eye(size, device=upper.device, dtype=upper.dtype)
    result: Tensor = torch.linalg.solve(one + skew, one - skew)
    return result


def divisor(number: int, most: int) -> int:
    """The largest divisor that is not above ``most``."""
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)
