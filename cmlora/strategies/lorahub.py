"""LoraHub (arXiv 2307.13269): coefficients found by gradient-free search, then one merged pass.

The search is separate from the strategy because it renders pictures. On pictures its objective is
ours, the paper's being a few-shot language loss: the negative score of a preview of few steps. And
the sum is sum_i c_i B_i A_i, which needs no equal ranks and has no cross terms.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from cmlora.errors import CmloraError
from cmlora.plan import Member, Plan, Policy, Step
from cmlora.strategies._passes import by_name, may_reuse, together
from cmlora.strategies._search import Point, evolution, ngopt


def lorahub(
    step: Step,
    members: Sequence[Member],
    policy: Policy,
    *,
    coefficients: tuple[float, ...] | None = None,
) -> Plan:
    """One pass with W' = W + sum_i c_i w_i B_i A_i.

    Args:
        step: the denoising step about to run.
        members: the LoRAs; their order makes no difference.
        policy: when cached features are refreshed.
        coefficients: c, found by `search`, one for each LoRA *sorted by name*. A single LoRA
            needs none.

    Raises:
        CmloraError: if there are no coefficients yet, or not one for each LoRA.
    """
    ordered = by_name(members)
    names = ", ".join(member.name for member in ordered)
    if coefficients is None:
        if len(ordered) > 1:
            raise CmloraError(
                "lorahub has no coefficients yet: find them with cmlora.strategies.lorahub.search "
                f"and pass coefficients=(..), one for each of {names}"
            )
        coefficients = (1.0,)
    if len(coefficients) != len(ordered):
        raise CmloraError(f"lorahub: {len(coefficients)} coefficients for {names}; pass one each")
    scaled = [replace(m, weight=c * m.weight) for m, c in zip(ordered, coefficients, strict=True)]
    return Plan((together(scaled, may_reuse(step, policy)),))


def search(
    objective: Callable[[Point], float],
    count: int,
    *,
    budget: int = 40,
    bound: float = 1.5,
    seed: int = 0,
    optimizer: Literal["auto", "nevergrad", "es"] = "auto",
) -> Point:
    """Coefficients in [-bound, bound]^count that minimise objective(c) + 0.05 mean |c|.

    Args:
        objective: called exactly ``budget`` times; NaN counts as infinitely bad.
        count: how many coefficients, one per LoRA sorted by name.
        budget: number of evaluations, the first of them at zero.
        bound: largest absolute coefficient.
        seed: the same seed and objective give the same result.
        optimizer: ``nevergrad`` is NGOpt as in the paper; ``es`` is a (1+4) evolution strategy
            with the one-fifth rule that needs nothing installed; ``auto`` takes nevergrad if it
            is there.

    Returns:
        The best point that was evaluated.

    Raises:
        CmloraError: for a budget or bound that is not positive, or nevergrad asked for and absent.
    """
    if count < 1 or budget < 1 or not 0 < bound < math.inf:
        raise CmloraError(f"search: {count} LoRAs, budget {budget}, bound {bound} must be positive")
    installed = importlib.util.find_spec("nevergrad") is not None
    if optimizer == "nevergrad" and not installed:
        raise CmloraError("nevergrad is not installed; pip install nevergrad or use optimizer='es'")
    tried: list[tuple[float, Point]] = []

    def loss(point: Point) -> float:
        value = objective(point) + 0.05 * math.fsum(map(abs, point)) / count
        tried.append((math.inf if math.isnan(value) else value, point))
        return tried[-1][0]

    run = ngopt if installed and optimizer != "es" else evolution
    run(loss, count, budget, bound, seed)
    return min(tried, key=lambda pair: pair[0])[1]
