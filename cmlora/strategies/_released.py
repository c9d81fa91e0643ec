"""The schedule of CMLoRA's published code (repository Yqcca/CMLoRA), step by step with its defects.

It is here to reproduce published pictures, and differs from the paper in what the functions below
say. Constants are absolute steps, as published, whatever the number of steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from cmlora.errors import CmloraError
from cmlora.plan import Member, Plan, Policy, Step
from cmlora.strategies._passes import by_name, together

if TYPE_CHECKING:
    from torch import Tensor

Partition = Literal["offline", "online", "async"]

LATE_AFTER = 120
THRESHOLD = 0.40
FIRST_BIN = 80
SWITCHES = range(20, 201, 20)
HIGH = ("character", "clothing", "style", "object")


def released(step: Step, members: Sequence[Member], policy: Policy, partition: Partition) -> Plan:
    """N passes with the published shares and refreshes.

    - The shares are those of the first step throughout: c = N - 1/2 never decays.
    - The non-uniform policy times the rotation and reuses nothing; uniform ones do reuse.
    - Late refreshes are written to a copy of the slot list and have no effect.

    Raises:
        CmloraError: for a LoRA of no known class (the published code leaves it out without a
            word), and for a set of backgrounds alone (where it divides by zero).
    """
    ordered = by_name(members)
    refreshes = policy.refreshes(step.count)
    done = bisect_right(refreshes, step.index)  # k, counted before use
    refresh = step.index in refreshes
    if partition == "async":
        rotation = tuple(member.name for member in members)
        dominant, renewed = _asynchronous(step.index, len(rotation), refresh)
    else:
        high, low = _table(members)
        rotation = high + low
        late = bool(low) and (
            step.index > LATE_AFTER if partition == "offline" else _late_online(step)
        )
        dominant = (done - 1) % len(high) + late
        renewed = dominant if refresh and not late else None
    reuse = policy.reuse and not policy.name.startswith("nonuniform")

    def full(name: str) -> bool:
        emptied = renewed is not None and name == rotation[renewed]
        return not reuse or step.index == 0 or emptied

    n = len(ordered)
    c = n - 0.5
    shares = [(c if m.name == rotation[dominant] else 1.0) / (c + n - 1) for m in ordered]
    return Plan(tuple(together([m], not full(m.name)) for m in ordered), tuple(shares))


def _asynchronous(index: int, n: int, refresh: bool) -> tuple[int, int | None]:
    """Dominant and renewed positions: the dominant is one behind, at first the last LoRA.

    With k switches so far the dominant is (k - 1) mod N, but a refresh renews k mod N, k taken
    before the switch of this step: the next LoRA, except at a step that is a switch as well.
    """
    before = sum(switch < index for switch in SWITCHES)
    after = before + (index in SWITCHES)
    return (after - 1) % n, before % n if refresh else None


def _late_online(step: Step) -> bool:
    """m < g, with m at a fixed bin of the linear amplitude of sample 0's channel mean.

    Latents of 64 x 64 have no such bin: m is NaN, and the run is late from its second step on.
    An inspection without a model is taken for such a run.
    """
    measure = 1.0 if step.index == 0 else math.nan
    if step.index > 0 and step.sample is not None:
        measure = _intensity(step.sample)
    return not measure >= THRESHOLD


def _intensity(sample: Tensor) -> float:
    from cmlora.frequency.spectrum import intensity

    return float(intensity(sample[0].float().mean(0), first_bin=FIRST_BIN))


def _table(members: Sequence[Member]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """High and low names by role, by category, or by an id such as ``background_1``."""
    classes: dict[str, list[str]] = {"high": [], "low": []}
    for member in members:
        kind = member.category or member.name.partition("_")[0]
        role = member.role or ("low" if kind == "background" else "high" if kind in HIGH else None)
        if role is None:
            raise CmloraError(
                f"mode='released' places LoRAs by category, and {member.name!r} has none; set its "
                f"category to background, {', '.join(HIGH)}, or its role to high or low"
            )
        classes[role].append(member.name)
    if not classes["high"]:
        raise CmloraError(
            "mode='released' cannot run with low-frequency LoRAs alone; use mode='paper'"
        )
    return tuple(classes["high"]), tuple(classes["low"])
