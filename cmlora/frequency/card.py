"""A frequency profile, and the card it is kept on beside the LoRA's file."""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

from cmlora.atomic import replacing
from cmlora.container import sha256


class StaleCard(UserWarning):
    """A profile card that belongs to another file or base model, or cannot be read."""


@dataclass(frozen=True)
class Profile:
    """What a LoRA contributes in the course of a run on one base model.

    Args:
        lora: SHA-256 of the LoRA's file; empty as long as no card is written.
        base: `cmlora.frequency.profile.base_id` of the model it was measured on.
        fractions: where in the run each step is, 0 to 1, ascending.
        ratio: high-frequency share of the contribution at each step, 0 to 1.
        norm: size of the contribution at each step, relative to the base's predicted picture.

    Raises:
        ValueError: if there is no step, or the rows differ in length.
    """

    lora: str
    base: str
    fractions: tuple[float, ...]
    ratio: tuple[float, ...]
    norm: tuple[float, ...]

    def __post_init__(self) -> None:
        lengths = {len(self.fractions), len(self.ratio), len(self.norm)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"a profile needs rows of one length and a step; it has {lengths}")

    @property
    def frequency(self) -> float:
        """Mean high-frequency share over the steps with a contribution; NaN if there is none."""
        shares = [r for r, size in zip(self.ratio, self.norm, strict=True) if size > 0]
        return fmean(shares) if shares else math.nan

    @property
    def importance(self) -> tuple[tuple[float, float], ...]:
        """At every step's fraction, the size of the contribution at high frequencies."""
        rows = zip(self.fractions, self.ratio, self.norm, strict=True)
        return tuple((fraction, ratio * size) for fraction, ratio, size in rows)

    @property
    def window(self) -> tuple[float, float]:
        """The shortest part of the run that holds at least half of the contribution's size.

        Of equally short parts the one that holds most; the whole run if nothing is contributed.
        """
        edges = (*self.fractions, 1.0)
        whole = math.fsum(self.norm)
        if whole == 0:
            return edges[0], 1.0
        parts = []
        for first in range(len(self.norm)):
            for last in range(first + 1, len(edges)):
                held = math.fsum(self.norm[first:last])
                if held >= whole / 2:
                    # differences of fractions that are equal may differ in the last digit
                    length = round(edges[last] - edges[first], 9)
                    parts.append((length, -held, first, last))
        _, _, first, last = min(parts)
        return edges[first], edges[last]


def card_path(path: str | os.PathLike[str]) -> Path:
    """Where the card of a LoRA's file is: ``<file>.profile.json`` beside it."""
    return Path(f"{os.fspath(path)}.profile.json")


def write_card(path: str | os.PathLike[str], profile: Profile) -> Path:
    """Keep a profile beside its LoRA's file, which must be there.

    A card holds one profile per base model; those of another version of the file are dropped.

    Returns:
        The card's path.

    Raises:
        CmloraError: if the LoRA's file cannot be read or the card cannot be written.
    """
    digest, target = sha256(path), card_path(path)
    try:
        before = _parse(target) if target.exists() else {}
    except ValueError:
        before = {}
    kept = {base: card for base, card in before.items() if card.lora == digest}
    kept.pop(profile.base, None)
    kept[profile.base] = replace(profile, lora=digest)
    rows = {"format": 1, "profiles": [asdict(card) for card in kept.values()]}
    with replacing(target) as file:
        file.write((json.dumps(rows, indent=1) + "\n").encode())
    return target


def read_card(path: str | os.PathLike[str], base: str | None = None) -> Profile | None:
    """The profile kept beside a LoRA's file, if it is one of this file and this base model.

    Args:
        path: the LoRA's file.
        base: `cmlora.frequency.profile.base_id` of the model in use; ``None`` takes the profile
            that was written last.

    Returns:
        The profile, or ``None`` if there is no card or it does not fit; then a `StaleCard`
        warning says why.

    Raises:
        CmloraError: if there is a card but the LoRA's file cannot be read.
    """
    card = card_path(path)
    if not card.exists():
        return None
    try:
        profiles = _parse(card)
    except ValueError as error:
        _warn(card, f"is not a profile card ({error})")
        return None
    digest = sha256(path)
    fitting = [profile for profile in profiles.values() if profile.lora == digest]
    if not fitting:
        _warn(card, "was measured with another version of the file")
        return None
    if base is None:
        return fitting[-1]
    for profile in fitting:
        if profile.base == base:
            return profile
    known = ", ".join(profile.base for profile in fitting)
    _warn(card, f"was measured on base model {known}, not on {base}")
    return None


def _parse(card: Path) -> dict[str, Profile]:
    """The profiles of a card by base model, in the order they were written; ValueError if none."""
    try:
        rows = json.loads(card.read_text(encoding="utf-8"))["profiles"]
        profiles = [
            Profile(
                str(row["lora"]),
                str(row["base"]),
                *(tuple(map(float, row[key])) for key in ("fractions", "ratio", "norm")),
            )
            for row in rows
        ]
    except (KeyError, TypeError, OSError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not all(math.isfinite(v) for p in profiles for v in (*p.fractions, *p.ratio, *p.norm)):
        raise ValueError("a value is not finite")
    return {profile.base: profile for profile in profiles}


def _warn(card: Path, reason: str) -> None:
    warnings.warn(
        f"{card.name} {reason}; it is not used: measure again with cmlora profile",
        StaleCard,
        stacklevel=3,
    )
