"""FRUGAL: AdamW in a part of the space that moves around, signSGD in the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cmlora.adapters.training.optim.lowrank import SPREAD, LowRank
from cmlora.adapters.training.optim.projector import Projector, Random, Select, Svd
from cmlora.errors import CmloraError

SPACES = ("columns", "rows", "entries", "svd", "random", "blocks")
TURNS = ("random", "ascending", "descending", "mirror")
RESTS = ("sign", "sgd", "none")


class Frugal(LowRank):
    """``G = up(down(G)) + rest``: AdamW on the first part, ``-lr inactive sign(rest)`` on the rest.

    arXiv:2411.07837, algorithm 1. The part moves every ``gap`` steps, and its moments start anew.

    Args:
        params: parameters or groups.
        lr: learning rate.
        density: share of the space that has moments.
        gap: steps between two choices of it.
        space: "columns", "rows", "entries", "svd", "random" (orthogonal), or "blocks": whole
            matrices in turn.
        turn: order of the blocks: "random", "ascending", "descending" or "mirror".
        rest: "sign", "sgd" or "none".
        inactive: factor on the learning rate of the rest; 0.1 suits fine-tuning.
        options: betas, eps and weight_decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        density: float = 0.25,
        gap: int = 200,
        space: str = "columns",
        turn: str = "random",
        rest: str = "sign",
        inactive: float = 1.0,
        **options: Any,
    ) -> None:
        choices = (("space", space, SPACES), ("turn", turn, TURNS), ("rest", rest, RESTS))
        for name, value, allowed in choices:
            if value not in allowed:
                raise CmloraError(f"frugal: {name} is {value!r}, not one of {', '.join(allowed)}")
        if not 0 <= density <= 1:
            raise CmloraError(f"frugal: density is {density}, not from 0 to 1")
        own: dict[str, Any] = {"density": density, "gap": gap, "space": space, "turn": turn}
        super().__init__(params, lr, rest=rest, inactive=inactive, scale=1.0, **own, **options)
        self._matrices = [p for g in self.param_groups for p in g["params"] if p.ndim >= 2]

    def projector(self, matrix: Tensor, group: dict[str, Any]) -> Projector | None:
        space, density = group["space"], group["density"]
        if space == "blocks":
            return _Whole(density, group["turn"], len(self._matrices), self._place(matrix))
        if space in ("svd", "random"):
            rank = round(density * min(matrix.shape))
            return (Svd if space == "svd" else Random)(rank)
        return Select(density, space)

    def moved(self, old: dict[str, Any], state: dict[str, Any], group: dict[str, Any]) -> None:
        for key in ("first", "second", "count"):
            state.pop(key, None)

    def rest(
        self, gradient: Tensor, inside: Tensor, update: Tensor, state: dict[str, Any], group: Any
    ) -> Tensor:
        if group["rest"] == "none":
            return torch.zeros_like(gradient)
        outside = gradient - inside
        found: Tensor = outside.sign() if group["rest"] == "sign" else outside
        return found * float(group["inactive"])

    def _place(self, matrix: Tensor) -> int:
        where = [p.data_ptr() for p in self._matrices]
        return where.index(matrix.data_ptr())


class _Whole:
    """All of a matrix or nothing of it, by turns."""

    def __init__(self, density: float, turn: str, count: int, place: int) -> None:
        self.active, self.turn = round(density * count), turn
        self.count, self.place = count, place

    def fit(self, gradient: Tensor, state: dict[str, Any], seed: int) -> None:
        # The turn is the same for all matrices, the rest of a seed is the matrix's own.
        state["whole"] = self.place in chosen(self.count, self.active, seed // SPREAD, self.turn)

    def down(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        return gradient if state["whole"] else gradient.new_zeros(0)

    def up(self, small: Tensor, state: dict[str, Any], shape: torch.Size) -> Tensor:
        return small if state["whole"] else small.new_zeros(shape)


def chosen(count: int, active: int, turn: int, kind: str) -> set[int]:
    """Which of ``count`` blocks are active in a turn.

    >>> [sorted(chosen(5, 2, turn, "ascending")) for turn in range(3)]
    [[0, 1], [2, 3], [0, 4]]
    >>> [sorted(chosen(4, 2, turn, "mirror")) for turn in range(4)]
    [[0, 1], [2, 3], [2, 3], [0, 1]]
    """
    order = list(range(count))
    if kind == "random":
        random = torch.Generator().manual_seed(turn)
        return set(torch.randperm(count, generator=random)[:active].tolist())
    if kind == "descending":
        order.reverse()
    elif kind == "mirror":
        order += order[::-1]
    places = range(turn * active, (turn + 1) * active)
    return {order[place % len(order)] for place in places} if order else set()
