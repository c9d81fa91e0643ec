"""Fira: GaLore, and the rest of the gradient at the pace of what Adam did inside the subspace."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cmlora.adapters.training.optim.galore import GaLore
from cmlora.adapters.training.optim.projector import one_side

GROWTH = 1.01


class Fira(GaLore):
    """GaLore plus ``phi (G - up(down(G)))``, so that the update has full rank.

    arXiv:2410.01623, equations 7 and 8: phi is ``|Adam(g)| / |g|`` per column of the projected
    gradient g, or per row where that is tall. The norm of this part grows by at most 1 % per step.

    Args:
        params: parameters or groups.
        lr: learning rate.
        parity: as the published code, which takes the scaled projection off the gradient, so that
            what is left still holds most of the subspace, and limits norms before Adam's bias is
            corrected, which holds this part back in the first steps.
        options: of `GaLore`.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, parity: bool = False, **options: Any
    ) -> None:
        super().__init__(params, lr, parity=parity, **options)

    def rest(
        self, gradient: Tensor, inside: Tensor, update: Tensor, state: dict[str, Any], group: Any
    ) -> Tensor:
        small = state["small"]
        one, two = group["betas"]
        spread, level = 1 - two ** state["count"], 1 - one ** state["count"]
        root = (state["second"] / spread).sqrt() + group["eps"]
        adapted = state["first"] / level / root
        # One factor per entry of the long side, which the projection leaves.
        dimension = 1 if one_side(group["side"], *gradient.shape) != "left" else 0
        phi = adapted.norm(dim=dimension) / (small.norm(dim=dimension) + 1e-8)
        if len(phi) != gradient.shape[1 - dimension]:
            phi = adapted.norm() / (small.norm() + 1e-8)  # projected on both sides
        elif dimension:
            phi = phi[:, None]
        if not group["parity"]:
            return limited(phi * (gradient - inside), state)
        correction: float = math.sqrt(spread) / level
        found = phi / correction * (gradient - group["scale"] * inside)
        held_back: Tensor = limited(found, state) * correction
        return held_back


def limited(rest: Tensor, state: dict[str, Any]) -> Tensor:
    """The tensor, shortened to 1.01 times the norm of the one before; remembers its norm."""
    norm = float(rest.norm())
    before = state.get("rest_norm")
    if before is not None and norm > GROWTH * before > 0:
        rest, norm = rest * (GROWTH * before / norm), GROWTH * before
    state["rest_norm"] = norm
    return rest


def sequence(norms: Iterable[float]) -> list[float]:
    """What the limiter makes of tensors of these norms.

    >>> [round(x, 5) for x in sequence([1, 1.005, 1.2, 0.5])]
    [1.0, 1.005, 1.01505, 0.5]
    """
    state: dict[str, Any] = {}
    return [float(limited(torch.tensor([n], dtype=torch.double), state)) for n in norms]
