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
    base's. A plan of a single pass, or with recalled outputs, stays as it is, and without guidance
    nothing changes.

    Args:
        plan: any plan.
    """
    if len(plan.passes) == 1 or any(item.recall for item in plan.passes):
        return plan
    both = plan.both and share_uncond(plan.both)
    plan = replace(plan, both=None)
    bases = [i for i, item in enumerate(plan.passes) if not item.weights]
    if bases:
        passes = tuple(
            item if i == bases[0] else replace(item, branch="cond")
            for i, item in enumerate(plan.passes)
        )
        return replace(plan, passes=passes, both=both)
    first = Pass({}, all(item.may_reuse for item in plan.passes), branch="uncond")
    others = tuple(replace(item, branch="cond") for item in plan.passes)
    combine, compare, observe = plan.combine, plan.compare, plan.observe
    if isinstance(combine, tuple):
        shares = (0.0, *combine) if compare is None else combine
        changed = replace(plan, passes=(first, *others), combine=shares)
    else:
        inner = combine
        changed = replace(plan, passes=(first, *others), combine=lambda outputs: inner(outputs[1:]))
    if compare is not None:
        rule = compare

        def without(outputs: Tensor, previous: Tensor | None) -> Tensor:
            return rule(outputs[1:], None if previous is None else previous[1:])

        changed = replace(changed, compare=without)
    if observe is not None:
        seen = observe
        changed = replace(changed, observe=lambda sample, outputs: seen(sample, outputs[1:]))
    return replace(changed, both=both)
