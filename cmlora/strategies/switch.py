"""LoRA Switch (arXiv 2402.16843): one LoRA at a time, the next one every tau steps."""

from collections.abc import Sequence
from typing import Annotated

from cmlora.plan import Member, Plan, Policy, Step
from cmlora.strategies._passes import by_name, may_reuse, together
from cmlora.strategies.options import Between


def switch(
    step: Step, members: Sequence[Member], policy: Policy, *, tau: Annotated[int, Between(1)] = 5
) -> Plan:
    """One pass with LoRA floor(((t - 1) mod N tau) / tau) + 1, where t = 1 .. T.

    Args:
        step: the denoising step about to run.
        members: the LoRAs in the order of their turns; the paper's is character, clothing, style,
            background, object.
        policy: when cached features are refreshed. The first step of a turn is full in any case:
            the LoRA's own feature dates from its turn before.
        tau: steps per turn.
    """
    by_name(members)
    turn, since = divmod(step.index, tau)
    begins = since == 0 and len(members) > 1
    active = members[turn % len(members)]
    return Plan((together([active], may_reuse(step, policy) and not begins),))
