"""Switch-A (arXiv 2502.04923): LoRA Switch within the frequency class that is due."""

import math
from collections.abc import Sequence
from typing import Annotated

from cmlora.frequency.order import Order, phases, single_phase
from cmlora.plan import Member, Plan, Policy, Step
from cmlora.strategies._passes import by_name, may_reuse, together
from cmlora.strategies.options import Between


def switch_a(
    step: Step,
    members: Sequence[Member],
    policy: Policy,
    *,
    tau: Annotated[int, Between(1)] = 5,
    late: Annotated[float, Between(0, 1)] = 0.6,
    order: Order = "measured",
) -> Plan:
    """One pass with one LoRA, the next of its class every tau steps; CMLoRA with one-hot shares.

    Before ``late`` the turns go round the class that comes first, from then on round the other.
    Where nothing tells the LoRAs apart this is `cmlora.strategies.switch`.

    Args:
        step: the denoising step about to run.
        members: the LoRAs.
        policy: when cached features are refreshed. The first step of a turn is full in any case.
        tau: steps per turn.
        late: where the late phase begins, as a fraction of the steps (tau*).
        order: which class comes first, see `cmlora.frequency.order.phases`.
    """
    named = {member.name: member for member in by_name(members)}
    early_names, late_names = phases(members, order)
    edge = math.ceil(late * step.count - 1e-9)
    if single_phase(early_names, late_names) or step.index < edge:
        names, since = early_names, step.index
    else:
        names, since = late_names, step.index - edge
    turn, within = divmod(since, tau)
    begins = within == 0 and (len(names) > 1 or since == 0)
    active = named[names[turn % len(names)]]
    return Plan((together([active], may_reuse(step, policy) and not begins),))
