"""S2FT: a few rows or columns of the weight are trained, all others stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.errors import CmloraError


@dataclass
class S2ftConfig(TunerConfig):
    """Settings of S2FT; ``r`` is not used.

    Args:
        side: "input" trains columns, "output" rows; a column of a convolution is a channel.
        share: of the channels that are trained; at least one block is.
        block: channels that are chosen together: the size of an attention head.
        select: "random", or "weight" for the channels of the largest norm.
    """

    side: str = "input"
    share: float = 0.05
    block: int = 1
    select: str = "random"
    method: ClassVar[str] = "s2ft"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in ("input", "output") or self.select not in ("random", "weight"):
            raise CmloraError(f"s2ft: side={self.side!r}, select={self.select!r} are not known")
        if not 0 < self.share <= 1:
            raise CmloraError(f"s2ft: share is {self.share}, not above 0 and up to 1")


class S2ftLayer(TunerLayer):
    """``W[:, S] + V`` or ``W[S] + V`` with a fixed set S and ``V`` from zero.

    arXiv:2412.06289, by index instead of by permuting the weights. S follows from the seed, or
    from the weight. Adapters with disjoint sets do not touch each other's entries. Training
    columns of a linear layer keeps only their part of the input for the backward pass.
    """

    method = "s2ft"
    trained = ("values",)

    def start(self, name: str) -> dict[str, Tensor]:
        count, (outputs, inputs) = len(self.chosen(name)), self.matrix().shape
        shape = (outputs, count) if self.config[name].side == "input" else (count, inputs)
        return {"values": torch.zeros(shape)}

    def constants(self, name: str) -> dict[str, Tensor]:
        config, matrix = self.config[name], self.matrix()
        channels = self.get_base_layer().weight.shape[1]
        if config.side == "input":  # (channels, everything of a channel)
            matrix = matrix.reshape(len(matrix), channels, -1).transpose(0, 1).flatten(1)
        units = len(matrix) // config.block
        if len(matrix) % config.block:
            raise CmloraError(f"s2ft: {len(matrix)} channels do not divide into blocks")
        if config.select == "random":
            order = torch.randperm(units, generator=self.random(name))
        else:
            norms = matrix.reshape(units, -1).norm(dim=1)
            order = norms.argsort(descending=True, stable=True).cpu()
        best = order[: max(1, round(config.share * units))].sort().values
        found = (best[:, None] * config.block + torch.arange(config.block)).flatten()
        if config.side == "input":
            width = matrix.shape[1] // self.matrix().shape[0]  # kernel entries per channel
            found = (found[:, None] * width + torch.arange(width)).flatten()
        return {"chosen": found}

    def chosen(self, name: str) -> Tensor:
        """Which rows, or columns of the flattened weight, are trained."""
        return self.frozen(name, "chosen")

    def change(self, name: str, x: Tensor) -> Tensor:
        if self._groups != 1:
            return super().change(name, x)
        values, chosen = self.tensor(name, "values") * self.scaling[name], self.chosen(name)
        base = self.get_base_layer()
        linear = isinstance(base, nn.Linear)
        dimension = -1 if linear else 1
        if self.config[name].side == "output":
            small = self.apply_matrix(x, values)
            shape = list(small.shape)
            shape[dimension] = base.weight.shape[0]
            return small.new_zeros(shape).index_add(dimension, chosen, small)
        # Backward needs the chosen channels of the input alone, so only they are kept.
        width = 1 if linear else base.weight[0, 0].numel()
        part = x.index_select(dimension, chosen[::width] // width)
        values = values.to(x.dtype)
        if linear:
            return functional.linear(part, values)
        kernel = values.reshape(len(values), part.shape[1], *base.weight.shape[2:])
        result: Tensor = base._conv_forward(part, kernel, None)
        return result

    def update(self, name: str) -> Tensor:
        values, chosen = self.tensor(name, "values"), self.chosen(name)
        dimension = 1 if self.config[name].side == "input" else 0
        zero = values.new_zeros(self.matrix().shape)
        return zero.index_add(dimension, chosen, values)
