"""Curves for the LoRAs of a composition, and for parts of the denoiser."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cmlora.errors import CmloraError
from cmlora.plan import Step, Strength
from cmlora.schedules.curve import Curve


@dataclass(frozen=True)
class Track:
    """One LoRA's curve.

    Args:
        lora: its name in the pipeline.
        curve: multiplies its weight.
        blocks: a regular expression; the curve holds in the layers in whose names it is found,
            such as ``down_blocks``, ``attn2`` or ``^single_transformer_blocks.3.``; ``None`` is
            everywhere.
        text: multiplies its weight in the text encoders, which run once, before the first step;
            ``None`` leaves it as it is.

    Raises:
        CmloraError: if there is no name, or the expression is none, or one that could take for
            ever to look for.
    """

    lora: str
    curve: Curve
    blocks: str | None = None
    text: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", self.blocks or None)
        if not self.lora:
            raise CmloraError("schedule: a curve without the name of its LoRA")
        try:
            re.compile(self.blocks or "")
        except re.error as error:
            raise CmloraError(
                f"schedule: blocks {self.blocks!r} of {self.lora} is no regular expression "
                f"({error.msg} at character {error.pos or 0})"
            ) from None
        if not _quick(self.blocks or ""):
            raise CmloraError(
                f"schedule: blocks {self.blocks!r:.60} of {self.lora:.60} could take for ever to "
                "look for; write at most 200 characters, three of * + ? {, and four groups, none "
                "of them repeated"
            )


def _quick(expression: str) -> bool:
    """Whether looking for it in a layer's name ends soon; schedules come with other's pictures."""
    bare = re.sub(r"\\.", "x", expression.replace("(?:", "("))
    ways = math.prod(group.count("|") + 1 for group in re.findall(r"\([^()]*\)", bare))
    return (
        len(expression) <= 200
        and bare.count("(") <= 4
        and ways <= 1000
        and sum(map(bare.count, "*+?{")) <= 3
        and re.search(r"\)[*+?{]", bare) is None
    )


@dataclass(frozen=True)
class Schedule:
    """The curves of a composition. LoRAs and blocks that it does not name keep their weights.

    Args:
        tracks: several may be of one LoRA if they are for different blocks; of those whose
            expressions are found in a layer's name, the first counts.

    Raises:
        CmloraError: if two curves are for the same LoRA and the same blocks.
    """

    tracks: tuple[Track, ...] = ()

    def __post_init__(self) -> None:
        seen = set()
        for track in self.tracks:
            place = (track.lora, track.blocks)
            if place in seen:
                where = f" in blocks {track.blocks!r}" if track.blocks else ""
                raise CmloraError(f"schedule: {track.lora} has two curves{where}; keep one")
            seen.add(place)

    @property
    def names(self) -> tuple[str, ...]:
        """The LoRAs that have a curve, in the order they are first named."""
        return tuple(dict.fromkeys(track.lora for track in self.tracks))

    def factor(self, lora: str, step: Step) -> Strength:
        """What multiplies a LoRA's weight at a step, by layer if there are curves for blocks."""
        mine = [track for track in self.tracks if track.lora == lora]
        everywhere = next((t for t in mine if t.blocks is None), None)
        rest = 1.0 if everywhere is None else everywhere.curve.at(step)
        parts = [(t.blocks, t.curve.at(step)) for t in mine if t.blocks is not None]
        if not parts:
            return rest
        return (*parts, ("", rest))

    def text_factor(self, lora: str) -> float:
        """What multiplies a LoRA's weight in the text encoders."""
        said = [t.text for t in self.tracks if t.lora == lora and t.text is not None]
        return said[0] if said else 1.0

    def check(self, loras: Sequence[str]) -> None:
        """Raises `CmloraError` unless all LoRAs it names are among those that are composed."""
        for name in self.names:
            if name not in loras:
                listed = ", ".join(loras) or "none"
                raise CmloraError(f"schedule: no LoRA {name!r} is composed; composed: {listed}")


def product(one: Strength, other: Strength) -> Strength:
    """Two strengths multiplied, layer by layer.

    >>> product(2.0, (("down", 0.5), ("", 1.0)))
    (('down', 1.0), ('', 2.0))
    """
    if not isinstance(one, tuple) and not isinstance(other, tuple):
        return one * other
    if not isinstance(one, tuple):
        return tuple((pattern, one * factor) for pattern, factor in _parts(other))
    if not isinstance(other, tuple):
        return tuple((pattern, factor * other) for pattern, factor in one)
    return tuple((_both(p, q), f * g) for p, f in one for q, g in other)


def silent(strength: Strength) -> bool:
    """Whether a LoRA of this strength acts nowhere."""
    return all(factor == 0 for _, factor in _parts(strength))


def _parts(strength: Strength) -> tuple[tuple[str, float], ...]:
    return strength if isinstance(strength, tuple) else (("", strength),)


def _both(one: str, other: str) -> str:
    """An expression that is found where both are."""
    if not one or not other:
        return one or other
    return f"^(?=.*(?:{one}))(?=.*(?:{other}))"
