"""One fresh prediction per step; those of the LoRAs follow it at their last known distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from cmlora.caching.modifiers import in_turn
from cmlora.plan import Combine, Member, Plan, Policy, Step
from cmlora.strategies._passes import by_name, may_reuse, together
from cmlora.strategies._selection import Selection, combination, everywhere
from cmlora.strategies.options import Between

if TYPE_CHECKING:
    from torch import Tensor


def delta(
    step: Step,
    members: Sequence[Member],
    policy: Policy,
    *,
    rule: Literal["select", "composite"] = "select",
    anchor: Literal["merge", "base"] = "merge",
    every: Annotated[int, Between(1)] = 2,
    oldest: Annotated[float | None, Between(0, 1)] = None,
    strength: Annotated[float, Between(0)] = 1.5,
    sharpness: Annotated[float, Between(0)] = 4.0,
) -> Plan:
    """An anchor pass at every step, and each LoRA's difference from it as it was last measured.

    With anchor f, e_j(t) = f(t) + (e_j(t_j) - f(t_j)): what the predictions have in common is
    always new, only their differences, which change slowly, are as old as t_j, the LoRA's last
    pass of its own; the anchor is what a control variate is to an estimate. All passes are run at
    the first step, and then one in turn at every so many. The price is 1 + 1 / ``every`` passes
    per step, whatever the number of LoRAs.

    Args:
        step: the denoising step about to run.
        members: the LoRAs; their order makes no difference.
        policy: when cached features are refreshed; that holds for the anchor pass.
        rule: how the predictions are combined; ``select`` has a base pass that takes turns too.
        anchor: all LoRAs together, or the base model.
        every: steps from one measurement to the next.
        oldest: a difference older than this part of the run is measured at any step.
        strength: of ``select``.
        sharpness: of ``select``.
    """
    ordered = by_name(members)
    common = everywhere(step, ordered, "label", 1.0) if rule == "select" else ()
    local = [member for member in ordered if member not in common]
    if len(local) == 1:
        return Plan((together(ordered, may_reuse(step, policy)),))
    light = may_reuse(step, policy)
    first = together(ordered if anchor == "merge" else common, light)
    rows = [together([*common, member], False) for member in local]
    combine: Combine = mean
    if rule == "select":
        combine = combination(Selection(strength=strength, sharpness=sharpness))
        if anchor == "merge":
            rows = [together(common, False), *rows]
    limit = None if oldest is None else max(1, math.ceil(oldest * step.count - 1e-9))
    now = in_turn(tuple(range(0, step.count, every)), step.index, len(rows), True, limit)
    passes = [
        item if fresh else replace(item, recall=True) for item, fresh in zip(rows, now, strict=True)
    ]
    # the anchor's own row has a part in the result only where it is the base that is selected from
    skip = not (rule == "select" and anchor == "base")
    return Plan((first, *passes), _after(combine) if skip else combine, keep=True)


def mean(outputs: Tensor) -> Tensor:
    """Composite, as a function."""
    wide = outputs.float() if outputs.dtype.itemsize < 4 else outputs
    return wide.mean(0).to(outputs.dtype)


def _after(combine: Combine) -> Combine:
    """The combination of all rows but the first."""
    return lambda outputs: combine(outputs[1:])
