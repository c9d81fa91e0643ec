"""LoRA Merge: all LoRAs at once in the weights."""

from collections.abc import Sequence

from cmlora.plan import Member, Plan, Policy, Step
from cmlora.strategies._passes import by_name, may_reuse, together


def merge(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
    """One pass with W' = W + sum_i w_i B_i A_i.

    Args:
        step: the denoising step about to run.
        members: the LoRAs; their order makes no difference.
        policy: when cached features are refreshed.
    """
    return Plan((together(by_name(members), may_reuse(step, policy)),))
