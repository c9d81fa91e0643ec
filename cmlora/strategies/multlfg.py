"""MultLFG (arXiv 2505.20525): every frequency band follows the LoRAs that change it most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from cmlora.plan import Compare, Member, Plan, Policy, Step
from cmlora.strategies import _maps
from cmlora.strategies._passes import branched, by_name, each, may_reuse, together
from cmlora.strategies.options import Between

if TYPE_CHECKING:
    from torch import Tensor


def multlfg(
    step: Step,
    members: Sequence[Member],
    policy: Policy,
    *,
    levels: Annotated[int, Between(1, 6)] = 1,
    sharpness: Annotated[float, Between(0)] = 1.0,
    top: Annotated[int, Between(0)] = 0,
) -> Plan:
    """N passes with one LoRA each, combined band by band of a Haar wavelet transform.

    What is combined is every LoRA's guidance G_j = e_j^c - e_j^u:
    e^c = mean_j e_j^u + sum_b inverse_b(sum_j w_jb band_b(G_j)), e^u = mean_j e_j^u, with
    w_b = softmax over j of (sharpness c_jb / mean_j c_jb) and c_jb = |band_b(G_j) - its value at
    the step before|: a LoRA counts in the bands in which its guidance is changing. At the first
    step the weights are equal. Where guidance is two calls the first, for e^c, is answered when
    there is no e_j^u yet: at the first step it needs none, later the unconditional passes are run
    ahead. Without guidance the outputs themselves are weighed in this way. A single LoRA is run
    plainly.

    The paper takes the change from two passes at neighbouring times; here the outputs of the
    step before are kept instead, at half the price. Softmax and mean are our reading of it.

    Args:
        step: the denoising step about to run.
        members: the LoRAs; their order makes no difference.
        policy: when cached features are refreshed.
        levels: of the transform; each splits the low band again.
        sharpness: 0 is Composite; large values take one LoRA per band.
        top: only so many LoRAs per band, those that change most, are combined; 0 is all.
    """
    ordered = by_name(members)
    if len(ordered) == 1:
        return Plan((together(ordered, may_reuse(step, policy)),))
    passes = each(step, policy, ordered)
    alone, both = (
        Plan(passes, keep=True, compare=by_bands(levels, sharpness, top, known))
        for known in (False, True)
    )
    return branched(step, alone, both, ahead=True)


def by_bands(levels: int, sharpness: float, top: int, branches: bool) -> Compare:
    """The combination of `multlfg`: (N, B, C, H, W) now and before, to (B, C, H, W).

    Args:
        levels: see `multlfg`; fewer where the map is too small.
        sharpness: see `multlfg`.
        top: see `multlfg`.
        branches: whether the batch has an unconditional half first and a conditional one.
    """

    def weights(now: Tensor, before: Tensor | None) -> Tensor:
        """Of one band, by the sizes of its changes, (N, B, 1, 1, 1)."""
        if before is None:
            return now.new_full((len(now), 1, 1, 1, 1), 1 / len(now))
        change: Tensor = (now - before).flatten(2).square().sum(2).sqrt()[..., None, None, None]
        usual = change.mean(0, keepdim=True)
        logits = sharpness * change / usual.where(usual > 0, 1)
        if 0 < top < len(change):
            ranks = (-change).argsort(dim=0, stable=True).argsort(dim=0)
            logits = logits.masked_fill(ranks >= top, float("-inf"))
        return logits.softmax(0)

    def mix(now: Tensor, before: Tensor | None, level: int) -> Tensor:
        height, width = now.shape[-2:]
        if level == 0 or min(height, width) < 2:
            return _maps.mixed(weights(now, before), now)
        low, high = _maps.haar(now)
        low_before, high_before = (None, (None,) * 3) if before is None else _maps.haar(before)
        details = [
            _maps.mixed(weights(band, old), band)
            for band, old in zip(high, high_before, strict=True)
        ]
        merged = mix(low, low_before, level - 1)
        return _maps.unhaar(merged, (details[0], details[1], details[2]), height, width)

    def compare(outputs: Tensor, previous: Tensor | None) -> Tensor:
        now = _maps.exact(outputs)
        before = None if previous is None else _maps.exact(previous)
        if not branches:
            return mix(now, before, levels).to(outputs.dtype)
        unconditional = now.chunk(2, dim=1)[0].mean(0)
        guidance = mix(_guidance(now), None if before is None else _guidance(before), levels)
        result = outputs.new_empty(outputs.shape[1:])
        half = len(unconditional)
        result[:half], result[half:] = unconditional, unconditional + guidance
        return result

    return compare


def _guidance(outputs: Tensor) -> Tensor:
    unconditional, conditional = outputs.chunk(2, dim=1)
    return conditional - unconditional
