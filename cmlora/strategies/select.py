"""Every latent location follows the LoRAs that have something to say there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from cmlora.errors import CmloraError
from cmlora.plan import Member, Plan, Policy, Step
from cmlora.strategies._maps import Scale
from cmlora.strategies._passes import branched, by_name, each, may_reuse, together
from cmlora.strategies._selection import Bands, Selection, combination, everywhere, spreads
from cmlora.strategies.options import Between


def select(
    step: Step,
    members: Sequence[Member],
    policy: Policy,
    *,
    strength: Annotated[float, Between(0)] = 1.5,
    sharpness: Annotated[float, Between(0)] = 4.0,
    sharpness_end: Annotated[float | None, Between(0)] = None,
    scale: Scale = "mean",
    patch: Annotated[int, Between(1)] = 1,
    bands: Bands = "together",
    prior: Annotated[float, Between(0)] = 0.0,
    keep: Literal["label", "measured", "none"] = "measured",
    spread: Annotated[float, Between(0, 1)] = 0.87,
    common: Annotated[float, Between(0)] = 1.0,
    guidance: Literal["after", "before"] = "after",
) -> Plan:
    """A base pass and one pass for each of N LoRAs, combined as

    e = e_0 + s sum_j w_j(x) d_j,  d_j = e_j - e_0,
    w(x) = softmax over j of (sharpness |d_j(x)| / mean_x |d_j| + prior log r_j),

    with |.| the norm over channels: a LoRA counts where it departs from the base model more than
    it does elsewhere. Sharpness 0 and strength 1 is Composite. The weights sum to one at each
    location, but for other strengths the sum with e_0 is an extrapolation along the mixed
    direction, like guidance.

    LoRAs that change the whole picture, such as styles, would be broken into patches by this. They
    are active in every pass, the base pass included, and the others are selected among. Where a
    single LoRA is left to select, all run together in one plain pass.

    Args:
        step: the denoising step about to run.
        members: the LoRAs; their order makes no difference.
        policy: when cached features are refreshed.
        strength: s, how far to go along the selected direction; it makes up for what averaging
            N directions takes away.
        sharpness: 0 averages the LoRAs, large values take the strongest one at each location.
        sharpness_end: its value at the last step, in between it changes linearly; unset: constant.
        scale: what the sizes |d_j(x)| are divided by, see `cmlora.strategies._maps.relative`.
        patch: side of the squares of latent locations that are weighed together.
        bands: ``together`` weighs whole departures. ``apart`` splits them into low and high
            frequencies (the two parts of a Haar transform) and weighs each by its own sizes.
            ``low_first`` does so and lets the sharpness fall to 0 in the low band and rise from 0
            in the high band; ``high_first`` is the reverse.
        prior: how much the prompt decides: w_j is multiplied by r_j^prior, with r_j the LoRA's
            `cmlora.plan.Member.relevance`. 0 leaves the prompt aside.
        keep: which LoRAs are active in every pass: those labelled (``scope`` "global", or
            category "style" without a scope), and of those without a label the ones that are
            ``measured`` to be global at the first step; only those with a ``label``; or none.
        spread: from which value of (mean |d_j|)^2 / mean |d_j|^2 on a LoRA is measured global. It
            is 1 for one that changes all places alike and the share of the area for one that
            changes a part of it. Both styles of the embedded model and its forest reach 0.87.
        common: what multiplies the weights of those that are active in every pass.
        guidance: whether the pipeline's guidance comes ``after`` the selection, which is then
            made for each branch by itself, or ``before``: both branches are weighed by the guided
            departures u_j + g (c_j - u_j). Where guidance is two calls the first, for the
            conditional branch, has to be answered before any u_j exists: the unconditional passes
            are then run ahead with what their call was given at the step before. At the first step
            there is none, and the conditional branch is weighed by itself; a warning says so.

    Raises:
        CmloraError: if departures are to be weighed by a guidance whose scale is not known.
    """
    ordered = by_name(members)
    kept = everywhere(step, ordered, keep, spread)
    local = [member for member in ordered if member not in kept]
    weaker = tuple(replace(member, weight=common * member.weight) for member in kept)
    if len(local) == 1:
        return Plan((together(by_name([*local, *weaker]), may_reuse(step, policy)),))
    progress = step.index / max(step.count - 1, 1)
    end = sharpness if sharpness_end is None else sharpness_end
    how = Selection(
        strength=strength,
        sharpness=sharpness + (end - sharpness) * progress,
        scale=scale,
        patch=patch,
        bands=bands,
        progress=progress,
        prior=tuple(member.relevance for member in local),
        trust=prior,
    )
    unlabelled = any(member.scope is None and member.category is None for member in local)
    measuring = keep == "measured" and step.index == 0 and unlabelled
    plan = Plan(
        each(step, policy, local, base=True, common=weaker),
        combination(how),
        spreads([member.name for member in local]) if measuring else None,
    )
    if guidance == "after":
        return plan
    if step.apart and step.guidance is None:
        raise CmloraError("guidance='before': the pipeline does not tell its scale; use 'after'")
    both = replace(plan, combine=combination(replace(how, guidance=step.guidance)))
    return branched(step, plan, both, ahead=True)
