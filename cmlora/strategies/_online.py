"""What CMLoRA measures while it runs, and what it makes of it.

Two readings. Progress: m, the high-frequency share of the noisy latent x_t, which is near 1 at the
start of a run and falls as the picture appears; it says when the late phase begins. And at a few
probe steps the high-frequency share of every LoRA's own contribution, e_j - e_0, for which the base
model runs once more; it says which class an unlabelled LoRA belongs to. At a fixed noise level the
contribution to the predicted picture is a multiple of e_j - e_0 whatever the model predicts, so
this share is the one of a measured profile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from cmlora.frequency.order import Order, labelled, phases
from cmlora.plan import Member, Observe, Step
from cmlora.strategies._clock import Era

if TYPE_CHECKING:
    from torch import Tensor

Observed = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Readings:
    """What is known at a step.

    Args:
        eras: the phases' sets over time, see `eras`.
        late: by step, whether it was measured to be in the late phase.
        probing: whether the contributions are to be measured at this step.
        observe: what is to be handed to later steps.
    """

    eras: tuple[Era, ...]
    late: Mapping[int, bool]
    probing: bool
    observe: Observe | None


def read(
    step: Step,
    members: Sequence[Member],
    order: Order,
    switching: bool,
    probing: bool,
    threshold: float,
    split: float,
) -> Readings:
    """Measure the latent if the dominance may change now, and recall what earlier steps measured.

    Args:
        step: the denoising step about to run.
        members: in the user's order; the passes are sorted by name.
        order: which class comes first.
        switching: whether the dominance changes hands at this step.
        probing: whether it is one of the `probe_steps`.
        threshold: g; the run is late while m < g, and so not where m is not a number.
        split: h of m and of the contributions' shares.
    """
    late = {int(row["step"]): bool(row["late"]) for row in step.observed if "late" in row}
    row = {"step": float(step.index)}
    if switching and step.sample is not None:
        high = progress(step.sample, split)
        late[step.index] = high < threshold
        # m itself is written down so that the threshold can be calibrated on recorded runs
        row |= {"late": float(late[step.index]), "high": high}
    names = sorted(member.name for member in members) if probing else []
    observe = _observing(row, names, split) if len(row) > 1 or probing else None
    return Readings(eras(members, order, step.observed), late, probing, observe)


def progress(sample: Tensor, split: float) -> float:
    """m = R_h(x_t), the mean over the samples (B, C, H, W)."""
    from cmlora.frequency.spectrum import energy_ratio

    return float(energy_ratio(sample, split).mean())


def eras(members: Sequence[Member], order: Order, observed: Observed) -> tuple[Era, ...]:
    """The phases' sets over time: those of the labels, revised after every probe.

    Labels win: only LoRAs without role, profile and category take the mean of what was observed.
    """
    result = [Era(0, *phases(members, order))]
    shares: dict[str, list[float]] = {m.name: [] for m in members if not labelled(m)}
    for row in observed:
        found = {name: row.get(f"frequency:{name}", math.nan) for name in shares}
        for name, share in found.items():
            if math.isfinite(share):
                shares[name].append(share)
        if any(map(math.isfinite, found.values())):
            means = {name: fmean(values) for name, values in shares.items() if values}
            known = [replace(m, frequency=means.get(m.name, m.frequency)) for m in members]
            result.append(Era(int(row["step"]) + 1, *phases(known, order)))
    return tuple(result)


def probe_steps(members: Sequence[Member], count: int, late: float, probes: int) -> set[int]:
    """Steps at which contributions are measured, evenly over the early phase; none if all known."""
    if all(map(labelled, members)):
        return set()
    return {math.floor(i * late * count / probes) for i in range(probes)} & set(range(count))


def _observing(row: Mapping[str, float], names: Sequence[str], split: float) -> Observe:
    """`row` and the shares of ``names``, one per pass, against the last pass, the base's."""

    def observe(sample: Tensor, outputs: Tensor) -> Mapping[str, float]:
        from cmlora.frequency.spectrum import energy_ratio

        found = dict(row)
        for name, output in zip(names, outputs[: len(names)], strict=True):
            contribution = output.float() - outputs[-1].float()
            if contribution.any():  # a LoRA that does nothing has no frequency
                found[f"frequency:{name}"] = float(energy_ratio(contribution, split).mean())
        return found

    return observe
