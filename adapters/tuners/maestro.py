"""Maestro: low-rank factors whose ranks are ordered by importance, so that any number serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from cmlora.adapters.tuners.dylora import DyloraConfig, DyloraLayer
from cmlora.errors import CmloraError


@dataclass
class MaestroConfig(DyloraConfig):
    """Settings of Maestro."""

    method: ClassVar[str] = "maestro"


class MaestroLayer(DyloraLayer):
    """``U V^T`` cut to the rank of the step, with nothing to make up for what is cut.

    arXiv:2308.14929. In each step one layer is cut, at random, and the others are whole
    (`draw_layer`); `penalty` is added to the loss, and `importance` says what may be dropped.
    """

    method = "maestro"

    def factor(self, name: str) -> float:
        return 1.0

    def penalty(self, name: str) -> Tensor:
        """``sum_b |U[:, b:]| + |V[:, b:]|``, the hierarchical group lasso."""
        up, down = self.tensor(name, "up"), self.tensor(name, "down")
        return _tails(up.T).sum() + _tails(down).sum()

    def importance(self, name: str) -> Tensor:
        """``|U[:, b:]| |V[:, b:]|`` (R,); below about 1e-5 rank b and all after it do nothing."""
        return _tails(self.tensor(name, "up").T) * _tails(self.tensor(name, "down"))


def draw_layer(model: nn.Module, name: str, random: torch.Generator) -> tuple[int, int]:
    """Cuts one layer of a model to a rank, both drawn uniformly; all others are whole.

    Returns:
        The number of the layer, and its rank.
    """
    found = [m for m in model.modules() if isinstance(m, MaestroLayer) and name in m.r]
    if not found:
        raise CmloraError(f"there is no adapter {name!r} with ranks to choose from")
    for layer in found:
        layer.set_rank(name, layer.r[name])
    number = int(torch.randint(len(found), (), generator=random))
    rank = int(torch.randint(1, found[number].r[name] + 1, (), generator=random))
    found[number].set_rank(name, rank)
    return number, rank


def penalty(model: nn.Module, name: str) -> Tensor:
    """`MaestroLayer.penalty` summed over a model."""
    layers = (m for m in model.modules() if isinstance(m, MaestroLayer) and name in m.r)
    return sum((layer.penalty(name) for layer in layers), torch.zeros(()))


def _tails(rows: Tensor) -> Tensor:
    """Norms of all rows from the b-th on (R,)."""
    energy = rows.square().sum(1).flip(0).cumsum(0).flip(0)
    return (energy + 1e-24).sqrt()
