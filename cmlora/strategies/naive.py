"""No LoRA at all: what the base model makes of the prompt with its trigger words."""

from collections.abc import Sequence

from cmlora.plan import Member, Pass, Plan, Policy, Step
from cmlora.strategies._passes import may_reuse


def naive(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
    """One pass of the base model.

    Args:
        step: the denoising step about to run.
        members: ignored; their trigger words are in the prompt.
        policy: when cached features are refreshed.
    """
    return Plan((Pass({}, may_reuse(step, policy)),))
