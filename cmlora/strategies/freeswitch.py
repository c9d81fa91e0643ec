"""After FREE-Switch (arXiv 2604.10023): at every step the LoRA to which that step matters most."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Annotated

from cmlora.plan import Member, Plan, Policy, Step
from cmlora.strategies._passes import by_name, may_reuse, together
from cmlora.strategies.options import Between
from cmlora.strategies.switch import switch

Curve = tuple[tuple[float, float], ...]


def freeswitch(
    step: Step,
    members: Sequence[Member],
    policy: Policy,
    *,
    least: Annotated[float, Between(0, 1)] = 0.5,
    tau: Annotated[int, Between(1)] = 5,
) -> Plan:
    """One pass with the LoRA of largest I_j(t) / mean_t I_j(t).

    I_j is the LoRA's `cmlora.plan.Member.importance`: the size of what it changes at high
    frequencies at time t, measured once per LoRA (`cmlora profile`). It is taken relative to its
    own mean, or the strongest LoRA would have every step. One that was never measured is as
    important at every step; if none was, they take turns as in `cmlora.strategies.switch`.

    The paper's choice by importance is taken over, its alignment of prompts is not. That nobody
    gets less than a share of the steps is ours.

    Args:
        step: the denoising step about to run.
        members: the LoRAs.
        policy: when cached features are refreshed. The first step of a turn is full in any case.
        least: every LoRA has at least this part of T / N steps, those that matter most to it.
        tau: steps per turn where nothing was measured.
    """
    ordered = by_name(members)
    curves = tuple(member.importance or () for member in ordered)
    if not any(curves):
        return switch(step, members, policy, tau=tau)
    turns = winners(curves, step.count, least)
    active = turns[step.index]
    begins = len(ordered) > 1 and (step.index == 0 or turns[step.index - 1] != active)
    return Plan((together([ordered[active]], may_reuse(step, policy) and not begins),))


@lru_cache(maxsize=64)
def winners(curves: tuple[Curve, ...], count: int, least: float) -> tuple[int, ...]:
    """Whose step each is.

    Args:
        curves: importance of each LoRA over the run; empty is constant.
        count: T.
        least: see `freeswitch`.

    >>> winners((((0.0, 4.0), (1.0, 0.0)), ((0.0, 0.0), (1.0, 4.0))), 4, 0.5)
    (0, 0, 1, 1)
    """
    rows = [_relative(curve, count) for curve in curves]
    turns = [max(range(len(rows)), key=lambda j: (rows[j][i], -j)) for i in range(count)]
    quota = int(least * count / len(rows))
    for j, row in enumerate(rows):
        while turns.count(j) < quota:
            # taken from those who can spare a step, where the loss in importance is smallest
            open_steps = [i for i in range(count) if turns.count(turns[i]) > quota]
            turns[min(open_steps, key=lambda i: (rows[turns[i]][i] - row[i], i))] = j
    return tuple(turns)


def _relative(curve: Curve, count: int) -> list[float]:
    """Values at the beginning of each step, over their mean; 1 where nothing is known."""
    values = [interpolated(curve, i / count) if curve else 1.0 for i in range(count)]
    mean = sum(values) / count
    return [value / mean for value in values] if mean > 0 else [1.0] * count


def interpolated(curve: Curve, at: float) -> float:
    """Linear between the points of a curve, constant outside of them."""
    if at <= curve[0][0] or len(curve) == 1:
        return curve[0][1]
    position = bisect_right([x for x, _ in curve], at)
    if position == len(curve):
        return curve[-1][1]
    (x0, y0), (x1, y1) = list(pairwise(curve))[position - 1]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
