"""Every latent location follows the LoRAs that have something to say there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from cmlora.plan import Combine, Member, Pass, Plan, Policy, Step
from cmlora.strategies._passes import by_name, may_reuse, together
from cmlora.strategies.options import Between

if TYPE_CHECKING:
    from torch import Tensor


def select(
    step: Step,
    members: Sequence[Member],
    policy: Policy,
    *,
    strength: Annotated[float, Between(0)] = 1.5,
    sharpness: Annotated[float, Between(0)] = 4.0,
) -> Plan:
    """A base pass and N passes with one LoRA each, combined as

    e = e_0 + s sum_j w_j(x) d_j,  d_j = e_j - e_0,
    w(x) = softmax over j of (sharpness |d_j(x)| / mean_x |d_j|),

    with |.| the norm over channels: a LoRA counts where it departs from the base model more than
    it does elsewhere. Sharpness 0 and strength 1 is Composite. The weights sum to one at each
    location, but for other strengths the sum with e_0 is an extrapolation along the mixed
    direction, like guidance.

    A single LoRA is run plainly: its weight w is 1 everywhere, and there is nothing to select.

    Args:
        step: the denoising step about to run.
        members: the LoRAs; their order makes no difference.
        policy: when cached features are refreshed.
        strength: s, how far to go along the selected direction; it makes up for what averaging
            N directions takes away.
        sharpness: 0 averages the LoRAs, large values take the strongest one at each location.
    """
    ordered = by_name(members)
    reuse = may_reuse(step, policy)
    if len(ordered) == 1:
        return Plan((together(ordered, reuse),))
    passes = (Pass({}, reuse), *(together([member], reuse) for member in ordered))
    return Plan(passes, selection(strength, sharpness))


def selection(strength: float, sharpness: float) -> Combine:
    """The combination of `select`: (1 + N, B, C, H, W), base first, to (B, C, H, W)."""

    def combine(outputs: Tensor) -> Tensor:
        exact = outputs.float() if outputs.dtype.itemsize < 4 else outputs
        base = exact[0]
        departures = exact[1:] - base  # (N, B, C, H, W)
        size = departures.square().sum(2, keepdim=True).sqrt()  # (N, B, 1, H, W)
        mean = size.mean((-2, -1), keepdim=True)
        relative = size / mean.where(mean > 0, 1)
        weights = (sharpness * relative).softmax(0)
        mixed = weights[0] * departures[0]
        for weight, departure in zip(weights[1:], departures[1:], strict=True):
            mixed = mixed + weight * departure
        return (base + strength * mixed).to(outputs.dtype)

    return combine
