"""Two gradient-free optimisers that spend a budget of evaluations exactly."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable

Point = tuple[float, ...]
Loss = Callable[[Point], float]

BROOD = 4


def ngopt(loss: Loss, count: int, budget: int, bound: float, seed: int) -> None:
    """Nevergrad's NGOpt on [-bound, bound]^count, starting at zero."""
    import nevergrad

    space = nevergrad.p.Array(init=[0.0] * count).set_bounds(-bound, bound)
    space.random_state.seed(seed)
    solver = nevergrad.optimizers.NGOpt(parametrization=space, budget=budget)
    with warnings.catch_warnings():
        # NGOpt hands small problems to a solver whose own defaults that solver complains about
        warnings.filterwarnings("ignore", message="COBYLA")
        for _ in range(budget):
            candidate = solver.ask()
            value = loss(tuple(float(part) for part in candidate.value))
            solver.tell(candidate, min(value, 1e9))  # it warns of infinity


def evolution(loss: Loss, count: int, budget: int, bound: float, seed: int) -> None:
    """A (1 + 4) evolution strategy on [-bound, bound]^count, starting at zero.

    The step widens or narrows with the share of children better than their parent, in balance at
    one in five.
    """
    chance = random.Random(seed)
    parent: Point = (0.0,) * count
    best = loss(parent)
    reach = bound / 3
    left = budget - 1
    while left:
        brood = min(BROOD, left)
        left -= brood
        children = [
            tuple(max(-bound, min(bound, value + chance.gauss(0, reach))) for value in parent)
            for _ in range(brood)
        ]
        scored = [(loss(child), child) for child in children]
        better = sum(value < best for value, _ in scored) / brood
        reach = min(bound, reach * math.exp(0.8 * (better - 0.2)))
        value, child = min(scored, key=lambda pair: pair[0])
        if value <= best:
            best, parent = value, child
