"""A shared unconditional branch: what the LoRAs make of no prompt is computed once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from cmlora.plan import Pass, Plan

if TYPE_CHECKING:
    from torch import Tensor

Uncond = Literal["per_lora", "shared"]


def share_uncond(plan: Plan) -> Plan:
    """The same plan with the base model's unconditional prediction in place of every LoRA's.

    Of P passes on both branches of guidance, 2 P halves, P + 1 are left (P + 2 where the method
    needs the base's conditional one too). The unconditional half of every LoRA's output is the
    base's, which is always run, so that a recalled output is recalled in its conditional half. A
    plan of a single pass stays as it is, and without guidance nothing changes.

    Args:
        plan: any plan.
    """
    if len(plan.passes) == 1:
        return plan
    both = plan.both and share_uncond(plan.both)
    plan = replace(plan, both=None)
    bases = [i for i, item in enumerate(plan.passes) if not (item.weights or item.recall)]
    if bases:
        passes = tuple(
            item if i == bases[0] else replace(item, branch="cond")
            for i, item in enumerate(plan.passes)
        )
        return replace(plan, passes=passes, both=both)
    others = tuple(replace(item, branch="cond") for item in plan.passes)
    light = all(item.may_reuse for item in plan.passes if not item.recall)
    base = Pass({}, light, branch="uncond")
    # what is recalled follows the first pass, which then has to stay the first
    last = any(item.recall for item in plan.passes)
    passes = (*others, base) if last else (base, *others)
    own = slice(0, -1) if last else slice(1, None)
    combine, compare, observe = plan.combine, plan.compare, plan.observe
    if not isinstance(combine, tuple):
        inner = combine
        changed = replace(plan, passes=passes, combine=lambda outputs: inner(outputs[own]))
    elif compare is None:
        shares = (*combine, 0.0) if last else (0.0, *combine)
        changed = replace(plan, passes=passes, combine=shares)
    else:
        changed = replace(plan, passes=passes)
    if compare is not None:
        rule = compare

        def without(outputs: Tensor, previous: Tensor | None) -> Tensor:
            return rule(outputs[own], None if previous is None else previous[own])

        changed = replace(changed, compare=without)
    if observe is not None:
        seen = observe
        changed = replace(changed, observe=lambda sample, outputs: seen(sample, outputs[own]))
    return replace(changed, both=both)
