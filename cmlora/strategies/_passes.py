"""What the strategies share: passes in an order that does not depend on loading."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from cmlora.caching.modifiers import renewed
from cmlora.errors import CmloraError
from cmlora.plan import Member, Pass, Plan, Policy, Step


def by_name(members: Sequence[Member]) -> list[Member]:
    """The LoRAs sorted by name, so that sums over them are the same bit for bit.

    Raises:
        CmloraError: if there is none, or two have the same name.
    """
    names = [member.name for member in members]
    if not names:
        raise CmloraError("this method composes LoRAs and was given none; pass one or more")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CmloraError(f"LoRA {twice[0]!r} is listed twice; list it once and set its weight")
    return sorted(members, key=lambda member: member.name)


def together(members: Iterable[Member], may_reuse: bool) -> Pass:
    """One pass with all the given LoRAs active at their users' weights."""
    return Pass({member.name: member.weight for member in members}, may_reuse)


def may_reuse(step: Step, policy: Policy) -> bool:
    """Whether the only pass of a step may be light: at refresh steps every pass is full."""
    return not renewed(policy, step, 1)[0]


def each(
    step: Step,
    policy: Policy,
    members: Sequence[Member],
    *,
    base: bool = False,
    common: Sequence[Member] = (),
) -> tuple[Pass, ...]:
    """One pass per LoRA, in the given order.

    Args:
        step: the step about to run.
        policy: which of the passes are full.
        members: the LoRAs that take turns.
        base: whether a pass without them comes first.
        common: LoRAs that are active in every pass.
    """
    groups = [list(common)] * base + [[*common, member] for member in members]
    full = renewed(policy, step, len(groups))
    return tuple(together(group, not now) for group, now in zip(groups, full, strict=True))


def branched(step: Step, alone: Plan, both: Plan, *, ahead: bool = False) -> Plan:
    """The plan of a method that has a rule for both branches of guidance at once.

    Args:
        step: the step about to run.
        alone: the plan for one branch by itself.
        both: the plan for the unconditional and the conditional half.
        ahead: see `cmlora.plan.Plan`.
    """
    if step.apart:
        return replace(alone, both=both, ahead=ahead)
    return alone if step.guidance is None else both


def turn_lengths(weights: Sequence[float], total: int) -> list[int]:
    """Whole steps in proportion to weights, that add up to ``total``, by largest remainders.

    Where there is a step for everybody, everybody of weight above 0 has one.

    >>> turn_lengths([1.0, 1.0, 2.0], 10)
    [3, 2, 5]
    """
    positive = [i for i, weight in enumerate(weights) if weight > 0]
    if not positive:
        weights, positive = [1.0] * len(weights), list(range(len(weights)))
    whole = sum(weights[i] for i in positive)
    ideal = [total * weights[i] / whole if i in positive else 0.0 for i in range(len(weights))]
    lengths = [int(part) for part in ideal]
    left = total - sum(lengths)
    ranked = sorted(positive, key=lambda i: (int(ideal[i]) - ideal[i], i))
    for i in ranked[:left]:
        lengths[i] += 1
    if total >= len(positive):
        for i in positive:
            if lengths[i] == 0:
                lengths[lengths.index(max(lengths))] -= 1
                lengths[i] = 1
    return lengths
