"""LoRA Composite (arXiv 2402.16843): the mean of what every LoRA predicts on its own."""

from collections.abc import Sequence

from cmlora.plan import Member, Plan, Policy, Step
from cmlora.strategies._passes import by_name, each


def composite(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
    """N passes with one LoRA each, combined with equal shares 1/N.

    The paper takes the mean after guidance, (1/N) sum_i [e_i^u + s (e_i^c - e_i^u)]; guidance is
    linear, so the mean of the raw outputs gives the same.

    Args:
        step: the denoising step about to run.
        members: the LoRAs; their order makes no difference.
        policy: when cached features are refreshed.
    """
    ordered = by_name(members)
    return Plan(each(step, policy, ordered), (1 / len(ordered),) * len(ordered))
