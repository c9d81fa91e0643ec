"""How `cmlora.strategies.select` weighs the LoRAs: the combination, and who is global."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from cmlora.plan import Combine, Member, Observe, Step
from cmlora.strategies import _maps

if TYPE_CHECKING:
    from torch import Tensor

Bands = Literal["together", "apart", "low_first", "high_first"]


@dataclass(frozen=True)
class Selection:
    """The options of one step; see `cmlora.strategies.select`."""

    strength: float = 1.5
    sharpness: float = 4.0
    scale: _maps.Scale = "mean"
    patch: int = 1
    bands: Bands = "together"
    progress: float = 0.0
    prior: tuple[float | None, ...] = ()
    trust: float = 0.0
    guidance: float | None = None


def combination(how: Selection) -> Combine:
    """(1 + N, B, C, H, W), the base first, to (B, C, H, W)."""

    def combine(outputs: Tensor) -> Tensor:
        wide = _maps.exact(outputs)
        departures = wide[1:] - wide[0]
        if how.bands == "together":
            total = _selected(departures, how, how.sharpness)
        else:
            low = _maps.blurred(departures, 2)  # the low band of a Haar transform
            falling, rising = how.sharpness * (1 - how.progress), how.sharpness * how.progress
            first, second = {
                "apart": (how.sharpness, how.sharpness),
                "low_first": (falling, rising),
                "high_first": (rising, falling),
            }[how.bands]
            total = _selected(low, how, first) + _selected(departures - low, how, second)
        return (wide[0] + how.strength * total).to(outputs.dtype)

    return combine


def _selected(departures: Tensor, how: Selection, sharpness: float) -> Tensor:
    """sum_j w_j(x) d_j of one band."""
    measured = departures
    if how.guidance is not None:
        both = _maps.guided(departures, how.guidance)
        measured = both.repeat(1, 2, 1, 1, 1)
    size = _maps.blurred(_maps.sizes(measured), how.patch)
    logits = sharpness * _maps.relative(size, how.scale)
    for j, logit in enumerate(prior_logits(how.prior, how.trust)):
        logits[j] += logit
    return _maps.mixed(logits.softmax(0), departures)


def prior_logits(relevance: Sequence[float | None], trust: float) -> list[float]:
    """trust log(r_j / mean r), 0 for a LoRA of unknown relevance."""
    known = [value for value in relevance if value is not None]
    usual = fmean(known) if known else 0.0
    if usual <= 0 or trust == 0:
        return [0.0] * len(relevance)
    least = 1e-6  # a LoRA the prompt does not speak of is left out, not made infinitely unlikely
    return [0.0 if r is None else trust * math.log(max(r / usual, least)) for r in relevance]


def everywhere(
    step: Step, members: Sequence[Member], keep: str, threshold: float
) -> tuple[Member, ...]:
    """The LoRAs that are active in every pass; none if that would leave nobody to select."""
    if keep == "none":
        return ()
    found = {
        name.removeprefix("spread:"): value
        for row in step.observed
        for name, value in row.items()
        if name.startswith("spread:")
    }
    common = []
    for member in members:
        scope = member.scope
        if scope is None and member.category is not None:
            scope = "global" if member.category == "style" else "local"
        if scope is None and keep == "measured" and found.get(member.name, 0.0) >= threshold:
            scope = "global"
        if scope == "global":
            common.append(member)
    return tuple(common) if len(common) < len(members) else ()


def spreads(names: Sequence[str]) -> Observe:
    """Measures how widely every departure is spread, under ``spread:<name>``."""

    def observe(sample: Tensor, outputs: Tensor) -> Mapping[str, float]:
        wide = _maps.exact(outputs)
        size = _maps.sizes(wide[1:] - wide[0])  # (N, B, 1, H, W)
        mean, square = size.mean((-2, -1)), size.square().mean((-2, -1))
        share = (mean.square() / square.where(square > 0, 1)).mean((1, 2))
        return {f"spread:{name}": float(value) for name, value in zip(names, share, strict=True)}

    return observe
