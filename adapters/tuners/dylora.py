"""DyLoRA: a LoRA that works at every rank up to its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, cat, nn

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.tensors import kaiming
from cmlora.errors import CmloraError


@dataclass
class DyloraConfig(TunerConfig):
    """Settings of DyLoRA.

    Args:
        frozen: train only the last of the ranks in use, which is faster and sorts information.
    """

    frozen: bool = False
    method: ClassVar[str] = "dylora"


class DyloraLayer(TunerLayer):
    """``R / b`` times the first b columns of ``B`` and rows of ``A``, for the rank b of the step.

    arXiv:2210.07558; with the strength alpha / R the whole is alpha / b. `set_rank` chooses b,
    and `draw_rank` one at random for all layers of a step, before its forward pass. Cut to b
    ranks, the factors are an ordinary LoRA.
    """

    method = "dylora"
    trained = ("down", "up")

    def start(self, name: str) -> dict[str, Tensor]:
        outputs, inputs = self.matrix().shape
        self.state[name] = self.r[name]
        down = kaiming(self.r[name], inputs, self.random(name))
        return {"down": down, "up": torch.zeros(outputs, self.r[name])}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        rank = self.state[name]
        up, down = self.tensor(name, "up")[:, :rank], self.tensor(name, "down")[:rank]
        if self.config[name].frozen:
            up = cat([up[:, :-1].detach(), up[:, -1:]], 1)
            down = cat([down[:-1].detach(), down[-1:]])
        return up * self.factor(name), down

    def factor(self, name: str) -> float:
        """What the strength is multiplied by at the rank of the step."""
        return float(self.r[name] / self.state[name])

    def set_rank(self, name: str, rank: int) -> None:
        """Uses the first ranks only.

        Raises:
            CmloraError: if there are not so many.
        """
        if not 1 <= rank <= self.r[name]:
            raise CmloraError(f"{name}: rank {rank} is not between 1 and {self.r[name]}")
        self.state[name] = rank


def set_rank(model: nn.Module, name: str, rank: int) -> None:
    """`DyloraLayer.set_rank` for every layer of a model."""
    for layer in model.modules():
        if isinstance(layer, DyloraLayer) and name in layer.r:
            layer.set_rank(name, rank)


def draw_rank(model: nn.Module, name: str, random: torch.Generator) -> int:
    """A rank drawn uniformly for all layers of a model, to be called before every step."""
    ranks = [m.r[name] for m in model.modules() if isinstance(m, DyloraLayer) and name in m.r]
    if not ranks:
        raise CmloraError(f"there is no adapter {name!r} with ranks to choose from")
    rank = int(torch.randint(1, min(ranks) + 1, (), generator=random))
    set_rank(model, name, rank)
    return rank
