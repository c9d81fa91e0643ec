"""From labels and measurements to the two frequency classes and the order of the LoRAs.

The paper's result is H = {style, character, clothing, object}, L = {background}, with H fused
early and L late. That order is the reverse of the usual coarse-to-fine account of diffusion, so it
is a hypothesis here: ``measured`` follows the profiles, the other two are its ablations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Literal

from cmlora.plan import Member, Role

Order = Literal["measured", "high_first", "low_first"]

SPREAD = 0.02
"""Frequencies closer together than this are not told apart."""


def threshold(frequencies: Sequence[float], spread: float = SPREAD) -> float | None:
    """The value that splits measured frequencies into two groups, by exact 2-means on the line.

    Args:
        frequencies: shares of high-frequency energy, in any order.
        spread: below this distance between the largest and the smallest there is no split.

    Returns:
        What is low lies at or below this value and what is high above it; ``None`` for no split.
        Of two equally good splits the one with fewer low-frequency members.

    >>> threshold([0.75, 0.25, 0.875, 0.8125])
    0.5
    """
    values = sorted(frequencies)
    if len(values) < 2 or values[-1] - values[0] < spread:
        return None
    cuts = [i for i, (a, b) in enumerate(pairwise(values), 1) if a < b]
    cut = min(cuts, key=lambda i: _scatter(values[:i]) + _scatter(values[i:]))
    low, high = values[cut - 1], values[cut]
    middle = (low + high) / 2
    return middle if middle < high else low  # neighbouring floats have no middle


def partition(
    members: Sequence[Member], spread: float = SPREAD
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The high-frequency and the low-frequency LoRAs.

    The user's role decides; then the measured frequency, split by `threshold`; then the category,
    of which only "background" is low. A LoRA of which nothing is known counts as high, as all but
    one kind are in the paper.

    Args:
        members: in the user's order.
        spread: see `threshold`.

    Returns:
        (high, low) names. A class whose members have all been measured is sorted by falling
        frequency and then by name, whatever the order of ``members``; otherwise the user's order
        is kept inside it. One of the two may be empty: the set has a single phase.
    """
    measured = [m.frequency for m in members if m.frequency is not None and _known(m)]
    split = threshold(measured, spread) if len(measured) > 1 else None
    alike = len(measured) > 1 and split is None
    classes: dict[Role, list[Member]] = {"high": [], "low": []}
    for member in members:
        classes[_role(member, split, alike)].append(member)
    return _ranked(classes["high"], falling=True), _ranked(classes["low"], falling=True)


def phases(
    members: Sequence[Member], how: Order = "measured"
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which LoRAs take turns early in a run and which late.

    Args:
        members: in the user's order.
        how: ``high_first`` is the paper's order and ``low_first`` its reverse. ``measured`` puts
            the class first whose contributions come earlier (mean centre of
            `cmlora.plan.Member.window`), and is ``high_first`` where a window is missing.

    Returns:
        (early, late) names. If one class is empty both are all LoRAs: a single phase.
    """
    high, low = partition(members)
    low_first = how == "low_first" or (how == "measured" and _low_comes_first(members, low))
    by_name = {member.name: member for member in members}
    early, late = (
        _ranked([by_name[name] for name in names], falling=not low_first)
        for names in ((low, high) if low_first else (high, low))
    )
    return (early, late) if early and late else (early + late, early + late)


def order(members: Sequence[Member], how: Order = "measured") -> list[str]:
    """All names in the order in which they become dominant; see `phases`."""
    early, late = phases(members, how)
    return list(early if early == late else early + late)


def single_phase(early: Sequence[str], late: Sequence[str]) -> bool:
    """Whether `phases` found nothing to tell the LoRAs apart by."""
    return tuple(early) == tuple(late)


def labelled(member: Member) -> bool:
    """Whether the class of a LoRA is known without measuring anything."""
    return member.role is not None or _known(member) or member.category is not None


def _known(member: Member) -> bool:
    return member.frequency is not None and math.isfinite(member.frequency)


def _role(member: Member, split: float | None, alike: bool) -> Role:
    if member.role is not None:
        return member.role
    if member.frequency is not None and _known(member):
        if split is not None:
            return "high" if member.frequency > split else "low"
        if alike:
            return "high"
    return "low" if member.category == "background" else "high"


def _ranked(members: Sequence[Member], *, falling: bool) -> tuple[str, ...]:
    if not all(map(_known, members)):
        return tuple(member.name for member in members)
    sign = -1 if falling else 1
    ranked = sorted(members, key=lambda member: (sign * (member.frequency or 0.0), member.name))
    return tuple(member.name for member in ranked)


def _low_comes_first(members: Sequence[Member], low: Sequence[str]) -> bool:
    if not low or len(low) == len(members) or any(member.window is None for member in members):
        return False
    centres: dict[bool, list[float]] = {True: [], False: []}
    for member in sorted(members, key=lambda member: member.name):
        centres[member.name in low].append(fmean(member.window or ()))
    return fmean(centres[True]) < fmean(centres[False])


def _scatter(values: Sequence[float]) -> float:
    mean = fmean(values)
    return sum((value - mean) ** 2 for value in values)
