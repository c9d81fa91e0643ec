"""What the strategies share: passes in an order that does not depend on loading."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cmlora.errors import CmloraError
from cmlora.plan import Member, Pass, Policy, Step


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
    """The general rule: at a refresh step every pass is full, at the others every slot is used."""
    return policy.reuse and step.index not in policy.refreshes(step.count)
