"""W-Switch (arXiv 2606.03792): LoRA Switch with turns as long as the prompt speaks of a LoRA."""

from collections.abc import Sequence
from typing import Annotated

from cmlora.plan import Member, Plan, Policy, Step
from cmlora.strategies._passes import by_name, may_reuse, together, turn_lengths
from cmlora.strategies.options import Between


def w_switch(
    step: Step,
    members: Sequence[Member],
    policy: Policy,
    *,
    tau: Annotated[int, Between(1)] = 5,
    final: Annotated[int, Between(0)] = 5,
) -> Plan:
    """One pass with one LoRA; of every N tau steps each LoRA has a share r_j / sum r.

    r_j is the LoRA's `cmlora.plan.Member.relevance`, in the paper by how far the prompt's embedding
    moves when the LoRA's trigger words are left out (`cmlora.relevance.without_triggers`); with
    equal ones, or none, this is `cmlora.strategies.switch`. The last steps belong to a LoRA of
    category "character", for its identity's sake.

    Args:
        step: the denoising step about to run.
        members: the LoRAs in the order of their turns.
        policy: when cached features are refreshed. The first step of a turn is full in any case.
        tau: mean steps per turn.
        final: how many steps at the end the character has, but not more than half of a run.
    """
    by_name(members)
    if len(members) == 1:
        return Plan((together(members, may_reuse(step, policy)),))
    last = min(final, step.count // 2)
    characters = [member for member in members if member.category == "character"]
    edge = step.count - last if characters else step.count
    if step.index >= edge:
        active, since = characters[0], step.index - edge
    else:
        active, since = _in_turn(members, step.index, edge, tau)
    return Plan((together([active], may_reuse(step, policy) and since > 0),))


def _in_turn(members: Sequence[Member], index: int, count: int, tau: int) -> tuple[Member, int]:
    """Whose turn it is, and for how many steps it has been."""
    known = [member.relevance for member in members if member.relevance is not None]
    usual = sum(known) / len(known) if known else 1.0
    weights = [usual if m.relevance is None else m.relevance for m in members]
    cycle = min(len(members) * tau, count)
    position = index % cycle
    for member, length in zip(members, turn_lengths(weights, cycle), strict=True):
        if position < length:
            return member, position
        position -= length
    raise AssertionError("turns fill their cycle")
