"""LoRAtorio (arXiv 2508.11624): every patch follows the LoRAs least like the base model there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from cmlora.plan import Combine, Member, Plan, Policy, Step
from cmlora.strategies import _maps
from cmlora.strategies._passes import branched, by_name, each, may_reuse, together
from cmlora.strategies.options import Between

if TYPE_CHECKING:
    from torch import Tensor


def loratorio(
    step: Step,
    members: Sequence[Member],
    policy: Policy,
    *,
    patch: Annotated[int, Between(1)] = 2,
    temperature: Annotated[float, Between(1e-6)] = 1.0,
    recentre: Annotated[float, Between(0, 1)] = 0.5,
    top: Annotated[int, Between(0)] = 0,
) -> Plan:
    """A base pass and N passes with one LoRA each, combined patch by patch as

    e = sum_j w_jp e_j,  w_p = softmax over j of (-cos(e_jp, e_0p) / temperature),

    with e_jp the values of patch p, all channels. The similarities are those of the conditional
    branch and weigh both. The unconditional branch is re-centred on the base model's, with share
    lambda: (1 - lambda) e^u + lambda e_0^u. Where guidance is two calls, the conditional one first,
    its weights are kept for the other. Without guidance nothing is re-centred. A single LoRA is run
    plainly.

    The paper gives the softmin and lambda = 0.5; temperature 1 leaves the softmin as it is.

    Args:
        step: the denoising step about to run.
        members: the LoRAs; their order makes no difference.
        policy: when cached features are refreshed.
        patch: side of a patch in latent locations.
        temperature: small values let each patch follow one LoRA.
        recentre: lambda, the base model's share of the unconditional branch.
        top: only so many LoRAs, those least like the base model over the whole picture, are
            combined (the paper's dynamic selection); 0 is all.
    """
    ordered = by_name(members)
    if len(ordered) == 1:
        return Plan((together(ordered, may_reuse(step, policy)),))
    passes = each(step, policy, ordered, base=True)
    alone, both = (softmin(patch, temperature, recentre, top, known) for known in (False, True))
    return branched(step, Plan(passes, alone), Plan(passes, both))


def softmin(patch: int, temperature: float, recentre: float, top: int, branches: bool) -> Combine:
    """The combination of `loratorio`: (1 + N, B, C, H, W), the base first, to (B, C, H, W).

    Args:
        patch: see `loratorio`.
        temperature: see `loratorio`.
        recentre: see `loratorio`.
        top: see `loratorio`.
        branches: whether the batch has an unconditional half first and a conditional one.
    """

    def combine(outputs: Tensor) -> Tensor:
        wide = _maps.exact(outputs)
        measured = _maps.conditional(wide) if branches else wide
        base, loras = measured[0], measured[1:]
        product = _sums(loras * base, patch)
        lengths = (_sums(loras.square(), patch) * _sums(base.square(), patch)).sqrt()
        # a patch that is zero in one of them is like the base: its LoRA says nothing there
        cosine = product.where(lengths > 0, 1) / lengths.where(lengths > 0, 1)
        logits = -cosine / temperature
        if 0 < top < len(logits):
            likeness = cosine.mean((-2, -1), keepdim=True)  # (N, B, 1, 1, 1)
            ranks = likeness.argsort(dim=0, stable=True).argsort(dim=0)
            logits = logits.masked_fill(ranks >= top, float("-inf"))
        mixed = _maps.mixed(logits.softmax(0), wide[1:])
        if branches:
            unconditional, conditional = mixed.chunk(2)
            centre = wide[0].chunk(2)[0]
            unconditional = (1 - recentre) * unconditional + recentre * centre
            mixed = unconditional.new_empty(mixed.shape)
            half = len(unconditional)
            mixed[:half], mixed[half:] = unconditional, conditional
        return mixed.to(outputs.dtype)

    return combine


def _sums(values: Tensor, patch: int) -> Tensor:
    """Sums over channels, and means over patches: (.., C, H, W) to (.., 1, H, W)."""
    return _maps.blurred(values.sum(-3, keepdim=True), patch)
