"""W-Composite (arXiv 2606.03792): LoRA Composite with shares as the prompt speaks of each LoRA."""

from collections.abc import Sequence

from cmlora.plan import Member, Plan, Policy, Step
from cmlora.strategies._passes import by_name, each


def w_composite(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
    """N passes with one LoRA each, combined with shares r_j / sum r.

    r_j is the LoRA's `cmlora.plan.Member.relevance`, in the paper how much its trigger words are
    like the prompt (`cmlora.relevance.like_prompt`). A LoRA of unknown relevance has the mean of
    the others; with equal ones, or none, this is `cmlora.strategies.composite`.

    Args:
        step: the denoising step about to run.
        members: the LoRAs; their order makes no difference.
        policy: when cached features are refreshed.
    """
    ordered = by_name(members)
    return Plan(each(step, policy, ordered), relative(ordered))


def relative(members: Sequence[Member]) -> tuple[float, ...]:
    """Relevances that sum to one."""
    known = [member.relevance for member in members if member.relevance is not None]
    usual = sum(known) / len(known) if known else 1.0
    weights = [usual if m.relevance is None else m.relevance for m in members]
    whole = sum(weights)
    if whole <= 0:
        return (1 / len(weights),) * len(weights)
    return tuple(weight / whole for weight in weights)
