"""Block-LoRA: the blocks of a LoRA share one down factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.tensors import kaiming
from cmlora.errors import CmloraError


@dataclass
class BlockLoraConfig(TunerConfig):
    """Settings of Block-LoRA.

    Args:
        blocks: into how many the factors are cut.
        split: "rank", the blocks are ranks; "input", the blocks are inputs. Both readings of the
            paper train ``r O + r I / blocks`` numbers.
    """

    r: int = 8
    blocks: int = 2
    split: str = "rank"
    method: ClassVar[str] = "block_lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in ("rank", "input"):
            raise CmloraError(f"block_lora: split is {self.split!r}, not 'rank' or 'input'")
        if self.blocks < 1 or (self.split == "rank" and self.r % self.blocks):
            raise CmloraError(f"block_lora: r {self.r} cannot be cut into {self.blocks} blocks")


class BlockLoraLayer(TunerLayer):
    """``(sum_k B_k) A`` with ``A`` (R / N, I), or ``[B A, ..., B A]`` with ``A`` (R, I / N).

    arXiv:2501.16720. Over ranks the N blocks of ``B`` get equal gradients and move together: it is
    a LoRA of rank R / N whose up factor learns N times as fast. Over inputs, the parts of the input
    are summed before the factors.
    """

    method = "block_lora"
    trained = ("down", "up")

    def start(self, name: str) -> dict[str, Tensor]:
        outputs, inputs = self.matrix().shape
        config, random = self.config[name], self.random(name)
        blocks, rank = config.blocks, config.r
        if config.split == "rank":
            down = kaiming(rank // blocks, inputs, random)
            return {"down": down, "up": torch.zeros(blocks, outputs, rank // blocks)}
        if inputs % blocks:
            raise CmloraError(f"block_lora: {inputs} inputs cannot be cut into {blocks} blocks")
        down = kaiming(rank, inputs // blocks, random)
        return {"down": down, "up": torch.zeros(outputs, rank)}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        config = self.config[name]
        up, down = self.tensor(name, "up"), self.tensor(name, "down")
        if config.split == "rank":
            return up.sum(0), down
        return up, down.repeat(1, config.blocks)
