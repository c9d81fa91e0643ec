"""What the low-rank optimizers share: AdamW, on whole tensors or on projected gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cmlora.adapters.training.optim.projector import Projector, flat
from cmlora.errors import CmloraError

SPREAD = 100_003
"""Seeds of projectors are the turn, how often the subspace was chosen, times this, plus a number
of the matrix."""


def direction(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Adam's ``m / (sqrt(v) + eps)``, bias corrected; moments and their count are in the state."""
    if "first" not in state:
        state["count"] = 0
        state["first"] = torch.zeros_like(gradient)
        state["second"] = torch.zeros_like(gradient)
    state["count"] += 1
    one, two = group["betas"]
    state["first"].lerp_(gradient, 1 - one)
    state["second"].mul_(two).addcmul_(gradient, gradient, value=1 - two)
    root = (state["second"] / (1 - two ** state["count"])).sqrt_().add_(group["eps"])
    found: Tensor = (state["first"] / (1 - one ** state["count"])).div_(root)
    return found


class LowRank(Optimizer):
    """AdamW whose moments live in a subspace of each matrix; vectors get plain AdamW.

    Tensors of more than two dimensions are flattened to (O, I). Subclasses say which projector a
    matrix has and what is done with the rest of its gradient.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: of Adam.
        eps: of Adam.
        weight_decay: decoupled; applied before the step.
        options: of the subclass; each may be set per group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        betas = (float(betas[0]), float(betas[1]))
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise CmloraError(f"optimizer: betas are {betas}, not from 0 to below 1")
        if lr < 0 or weight_decay < 0 or eps < 0:
            raise CmloraError("optimizer: lr, weight_decay and eps are not negative")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, **options})

    def projector(self, matrix: Tensor, group: dict[str, Any]) -> Projector | None:
        """The projector of an (O, I) matrix; nothing for AdamW."""
        raise NotImplementedError

    def rest(
        self, gradient: Tensor, inside: Tensor, update: Tensor, state: dict[str, Any], group: Any
    ) -> Tensor:
        """What is added to the update for the part of the gradient outside the subspace."""
        return torch.zeros_like(gradient)

    def due(self, state: dict[str, Any], group: dict[str, Any]) -> bool:
        """Whether the subspace is chosen anew before this step."""
        return bool(state["step"] % group["gap"] == 0)

    def moved(self, old: dict[str, Any], state: dict[str, Any], group: dict[str, Any]) -> None:
        """Called when the subspace has changed, to carry the moments over."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns the loss if a closure computes it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._one(parameter, group, number)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a state as it was; the base class would make indices floating point."""
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(saved, own, strict=True):
            if key in state_dict["state"]:
                self.state[parameter] = _placed(state_dict["state"][key], parameter.device)

    def _one(self, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        gradient = parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = 0
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        projector = None
        if parameter.ndim >= 2:
            projector = self.projector(flat(parameter), group)
        if projector is None:
            update = direction(gradient, state, group)
        else:
            matrix = flat(gradient)
            update = self._projected(matrix, projector, state, group, number)
        parameter.add_(update.reshape(parameter.shape).to(parameter), alpha=-group["lr"])
        state["step"] += 1

    def _projected(
        self,
        matrix: Tensor,
        projector: Projector,
        state: dict[str, Any],
        group: dict[str, Any],
        number: int,
    ) -> Tensor:
        space = state.setdefault("space", {})
        if not space or self.due(state, group):
            old, turn = dict(space), state.get("turn", -1) + 1
            space.clear()
            projector.fit(matrix, space, seed=turn * SPREAD + number)
            state["turn"] = turn
            if old:
                self.moved(old, state, group)
        small = projector.down(matrix, space)
        state["small"] = small  # for `rest`; not kept
        whole = projector.up(direction(small, state, group), space, matrix.shape)
        inside = projector.up(small, space, matrix.shape)
        update: Tensor = whole * group["scale"]
        update = update + self.rest(matrix, inside, update, state, group)
        del state["small"]
        return update


def _placed(value: Any, device: torch.device) -> Any:
    """A copy of a state where the parameter is."""
    if isinstance(value, dict):
        return {key: _placed(inner, device) for key, inner in value.items()}
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def numbers(optimizer: Optimizer) -> int:
    """How many numbers an optimizer keeps, single counters aside."""
    return sum(_size(value) for state in optimizer.state.values() for value in state.values())


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return value.numel() if isinstance(value, Tensor) and value.ndim else 0


def at_most(rank: float, matrix: Tensor) -> int:
    """A rank as a whole number, or as a share of the shorter side; 1 at least."""
    short = min(matrix.shape)
    wanted = round(rank * short) if rank < 1 else int(rank)
    if not math.isfinite(rank) or rank <= 0:
        raise CmloraError(f"optimizer: rank is {rank}, not above 0")
    return max(1, min(wanted, short))
