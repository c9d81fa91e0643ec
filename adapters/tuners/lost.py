"""LOST: the leading part of the weight as factors, and the columns they miss most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, cat
from torch.nn import functional

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.tensors import svd
from cmlora.errors import CmloraError


@dataclass
class LostConfig(TunerConfig):
    """Settings of LOST.

    Args:
        balance: gamma, the share of the low-rank part; the columns get the rest.
        columns: share of the columns of the flattened weight that are trained.
        nonlinear: put SiLU between the factors, as the paper does; the adapter can then not be
            merged or exported.
    """

    balance: float = 0.7
    columns: float = 0.05
    nonlinear: bool = False
    method: ClassVar[str] = "lost"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.balance <= 1 or not 0 <= self.columns <= 1:
            raise CmloraError("lost: balance and columns are shares from 0 to 1")


class LostLayer(TunerLayer):
    """``g (B f(A x) - B0 f(A0 x)) + (1 - g) (C - C0) x[I]``, from the start ``B0, A0, C0``.

    arXiv:2508.02668, as an update. ``B0 A0`` is the best rank-R approximation of the weight W, I
    the columns with the largest norm in ``W - B0 A0``, and ``C0`` the columns I of W; only the
    difference ``C - C0`` is kept.
    """

    method = "lost"
    trained = ("down", "up", "columns")

    def start(self, name: str) -> dict[str, Tensor]:
        columns = torch.zeros(self.matrix().shape[0], len(self.frozen(name, "chosen")))
        first = {title: self.frozen(name, title) for title in ("down", "up")}
        return first | {"columns": columns}

    def constants(self, name: str) -> dict[str, Tensor]:
        config, matrix = self.config[name], self.matrix()
        left, values, right = svd(matrix, self.r[name])
        root = values.sqrt()
        rest = matrix - (left * values) @ right
        order = rest.norm(dim=0).argsort(descending=True, stable=True)
        chosen = order[: round(config.columns * matrix.shape[1])].sort().values
        return {"up": left * root, "down": root[:, None] * right, "chosen": chosen}

    def mergeable(self, name: str) -> bool:
        return not self.config[name].nonlinear

    def update(self, name: str) -> Tensor:
        balance: float = self.config[name].balance
        up, down, first_up, first_down = self._tensors(name)
        return balance * (up @ down - first_up @ first_down) + self._sparse(name)

    def change(self, name: str, x: Tensor) -> Tensor:
        function: Callable[[Tensor], Tensor] = functional.silu
        if self.mergeable(name) or self._groups != 1:
            self._need_mergeable(name)
            return super().change(name, x)
        up, down, first_up, first_down = self._tensors(name)
        # Sliced from one tensor: with and without a gradient the same product rounds differently.
        downs, ups, rank = cat([down, first_down]), cat([up, first_up], 1), len(down)
        now = self.apply_up(function(self.apply_matrix(x, downs[:rank])), ups[:, :rank])
        first = self.apply_up(function(self.apply_matrix(x, downs[rank:])), ups[:, rank:])
        sparse = self.apply_matrix(x, self._sparse(name))
        balance: float = self.config[name].balance
        return self.scaling[name] * (balance * (now - first) + sparse)

    def _sparse(self, name: str) -> Tensor:
        rest: float = 1 - self.config[name].balance
        columns = rest * self.tensor(name, "columns")
        zero = columns.new_zeros(self.matrix().shape)
        return zero.index_add(1, self.frozen(name, "chosen"), columns)

    def _tensors(self, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        up, down = self.tensor(name, "up"), self.tensor(name, "down")
        # Through the parameters' own precision, so that they cancel exactly at the start.
        dtype = self.held(name, "up").dtype
        first = [self.frozen(name, title).to(dtype).to(up.dtype) for title in ("up", "down")]
        return up, down, first[0], first[1]
