"""SLTrain: a low-rank update and a sparse one on a random support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.tensors import generator, kaiming, uniform
from cmlora.errors import CmloraError

_CHUNK = 2**22


@dataclass
class SltrainConfig(TunerConfig):
    """Settings of SLTrain.

    Args:
        density: share of the entries in the support of the sparse update.
        mode: "adapter" adds to the weight; "replace" takes its place, from a random start, as the
            paper trains whole models.
    """

    r: int = 128
    alpha: float | None = 32
    density: float = 0.03
    mode: str = "adapter"
    method: ClassVar[str] = "sltrain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.density <= 1:
            raise CmloraError(f"sltrain: density is {self.density}, not from 0 to 1")
        if self.mode not in ("adapter", "replace"):
            raise CmloraError(f"sltrain: mode is {self.mode!r}, not adapter or replace")


class SltrainLayer(TunerLayer):
    """``B A + S`` with ``floor(density O I)`` values of ``S`` at places that the seed decides.

    arXiv:2406.02214, beside a weight that stays, so ``S`` too starts at zero; or in its place, with
    the paper's start and ``B A + S - W`` as update. The strength alpha / r belongs to ``B A``; a
    weight multiplies all.
    """

    method = "sltrain"
    trained = ("down", "up", "values")

    def start(self, name: str) -> dict[str, Tensor]:
        outputs, inputs = self.matrix().shape
        down = kaiming(self.r[name], inputs, self.random(name))
        up = torch.zeros(outputs, self.r[name])
        values = torch.zeros(len(self.frozen(name, "places")))
        if self._replaces(name):
            values = uniform((len(values),), inputs**-0.5, generator(self.seeds[name] + 1))
        return {"down": down, "up": up, "values": values}

    def constants(self, name: str) -> dict[str, Tensor]:
        entries = self.matrix().numel()
        count = int(self.config[name].density * entries)
        places = torch.randperm(entries, generator=self.random(name))[:count]
        return {"places": places.sort().values}

    def update(self, name: str) -> Tensor:
        values = self.tensor(name, "values") / self.initial[name]
        sparse = values.new_zeros(self.matrix().numel())
        sparse = sparse.index_add(0, self.frozen(name, "places"), values)
        low = self.tensor(name, "up") @ self.tensor(name, "down")
        whole = low + sparse.reshape(low.shape)
        return whole - self.matrix() / self.initial[name] if self._replaces(name) else whole

    def change(self, name: str, x: Tensor) -> Tensor:
        if not isinstance(self.get_base_layer(), nn.Linear) or self._replaces(name):
            return super().change(name, x)
        scale = self.scaling[name]
        low = self.apply_up(
            self.apply_matrix(x, self.tensor(name, "down")), self.tensor(name, "up") * scale
        )
        values = self.tensor(name, "values") * (scale / self.initial[name])
        places, shape = self.frozen(name, "places"), self.matrix().shape
        sparse: Tensor = _Sparse.apply(x.flatten(0, -2), values.to(x.dtype), places, shape)
        return low + sparse.reshape(low.shape)

    def _replaces(self, name: str) -> bool:
        return bool(self.config[name].mode == "replace")


class _Sparse(torch.autograd.Function):
    """``x S^T`` whose gradient for the values of S is formed a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, places: Tensor, shape: Any) -> Tensor:
        ctx.save_for_backward(x, values, places)
        ctx.shape = shape
        return x @ _scattered(values, places, shape).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (x, values, places), error = ctx.saved_tensors, gradients[0]
        outputs, inputs = ctx.shape
        step = max(1, _CHUNK // inputs)
        found = torch.empty_like(values)
        for first in range(0, outputs, step):
            last = min(first + step, outputs)
            ends = torch.tensor([first * inputs, last * inputs], device=places.device)
            start, end = torch.searchsorted(places, ends).tolist()
            part = (error[:, first:last].T @ x).flatten()
            found[start:end] = part[places[start:end] - first * inputs]
        return error @ _scattered(values, places, ctx.shape), found, None, None


def _scattered(values: Tensor, places: Tensor, shape: Any) -> Tensor:
    empty = values.new_zeros(shape[0] * shape[1])
    return empty.index_copy(0, places, values).reshape(shape)
