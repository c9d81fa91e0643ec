"""MiSS, once called Bone: one small matrix is repeated over shards of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.errors import CmloraError


@dataclass
class MissConfig(TunerConfig):
    """Settings of MiSS.

    Args:
        form: "plain" repeats over the inputs, "mini" over the outputs too, "bat" multiplies
            blocks of the weight.
        mini_r: outputs after which "mini" begins again.
    """

    r: int = 64
    form: str = "plain"
    mini_r: int = 1
    method: ClassVar[str] = "miss"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("plain", "mini", "bat"):
            raise CmloraError(f"miss: form is {self.form!r}, not plain, mini or bat")


class MissLayer(TunerLayer):
    """Column j of the update is row ``j mod R`` of D (R, O); in "bat", block a, b is (W + I) D_a.

    arXiv:2409.15371. D starts at zero.
    """

    method = "miss"
    trained = ("shard",)

    def start(self, name: str) -> dict[str, Tensor]:
        (outputs, inputs), config = self.matrix().shape, self.config[name]
        if config.form == "bat":
            if outputs % config.r or inputs % config.r:
                raise CmloraError(f"miss: {outputs} x {inputs} has no blocks of size {config.r}")
            return {"shard": torch.zeros(outputs // config.r, config.r, config.r)}
        width = config.mini_r if config.form == "mini" else outputs
        if outputs % width:
            raise CmloraError(f"miss: mini_r {width} does not divide {outputs} outputs")
        return {"shard": torch.zeros(config.r, width)}

    def update(self, name: str) -> Tensor:
        matrix, shard, config = self.matrix(), self.tensor(name, "shard"), self.config[name]
        outputs, inputs = matrix.shape
        if config.form == "bat":
            size = config.r
            blocks = matrix.reshape(outputs // size, size, inputs // size, size)
            one = torch.eye(size, device=matrix.device, dtype=matrix.dtype)[:, None]
            return torch.einsum("aibj,ajk->aibk", blocks + one, shard).reshape(matrix.shape)
        rows = torch.arange(inputs, device=matrix.device) % config.r
        return shard[rows].T.repeat(outputs // shard.shape[1], 1)
