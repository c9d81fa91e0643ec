"""One pass in which every place of every layer follows the LoRAs that change it most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from cmlora.plan import Gate, Member, Plan, Policy, Step
from cmlora.strategies._passes import by_name, may_reuse, together
from cmlora.strategies._selection import everywhere
from cmlora.strategies.options import Between


def gate(
    step: Step,
    members: Sequence[Member],
    policy: Policy,
    *,
    strength: Annotated[float, Between(0)] = 1.0,
    sharpness: Annotated[float, Between(0)] = 8.0,
    keep: Literal["label", "none"] = "label",
    common: Annotated[float, Between(0)] = 0.7,
) -> Plan:
    """`select` inside the layers: one pass with all LoRAs, in which a layer W with updates B_j A_j
    computes at every place x (a latent location, a token)

    W h + s sum_j w_j u_j,  u_j = B_j A_j h,  w = softmax over j of (sharpness |u_j| / mean_x |u_j|)

    where merge computes W h + sum_j u_j: LoRAs that have little to say at a place do not disturb
    those that do. LoRAs that change the whole picture, such as styles, are added everywhere, a
    little weaker than alone, so that the others stay what they are. It costs one pass and the
    LoRAs' own products; layers that hold more than plain LoRAs (DoRA, other adapters) add theirs
    up.

    Args:
        step: the denoising step about to run.
        members: the LoRAs; their order makes no difference.
        policy: when cached features are refreshed.
        strength: s, how far to go along the selected updates; their weights sum to one.
        sharpness: 0 averages the LoRAs, large values take the strongest one at each place.
        keep: which LoRAs are added everywhere: those labelled (``scope`` "global", or category
            "style" without a scope), or none.
        common: what multiplies the weights of those.
    """
    ordered = by_name(members)
    names = tuple(member.name for member in everywhere(step, ordered, keep, 1.0))
    weighed = [replace(m, weight=common * m.weight) if m.name in names else m for m in ordered]
    single = together(weighed, may_reuse(step, policy))
    if len(ordered) - len(names) > 1:
        single = replace(single, gate=Gate(strength, sharpness, names))
    return Plan((single,))
