"""From measurements to advice: every rule is one line said to a person, and its reason."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from torch import Tensor

from cmlora.adapters.analysis.alignment import Overlap, cosines
from cmlora.adapters.analysis.balance import LOUD, stacking, weights
from cmlora.adapters.analysis.spikes import Spike

Topic = Literal["file", "prompt", "weights", "order", "method", "schedule"]

DUPLICATE = 0.95
"""Updates with a larger cosine are the same LoRA for all that can be seen."""
COLLIDING = 0.2
"""From this cosine, or share of directions beyond chance, on, LoRAs reach into each other."""
CANCELLING = -0.2
"""Below this cosine each takes away a part of the other."""
TOO_LOUD = math.sqrt(1 + COLLIDING)
"""A sum this many times as strong as LoRAs that do not interact is turned down."""
NEAR = 0.1
"""Depths in the model closer together than this are not told apart."""


@dataclass(frozen=True)
class Advice:
    """One thing to do.

    Args:
        topic: what it is about.
        do: what to do.
        because: the reason, with the number it rests on.
    """

    topic: Topic
    do: str
    because: str


@dataclass(frozen=True)
class Findings:
    """What is known of N LoRAs.

    Args:
        names: N.
        norms: N, sizes over the denoiser.
        whole: (N, N) inner products over all blocks.
        blocks: the same block by block.
        overlaps: shared directions, by pair of indices and block.
        spikes: by name.
        detail: N, 0 to 1, see `cmlora.adapters.analysis.detail.detail`.
        frequency: high-frequency shares by name, as far as they were measured on a model.
        categories: what each draws, by name, where its file says so.
        encoders: text encoders each changes, by name.
        triggers: words that call several, with the names of those.
        bases: what each was trained on, by name, where its file says so.
    """

    names: tuple[str, ...]
    norms: tuple[float, ...]
    whole: Tensor
    blocks: Mapping[str, Tensor]
    overlaps: Mapping[tuple[int, int], Mapping[str, Overlap]]
    spikes: Mapping[str, tuple[Spike, ...]]
    detail: tuple[float, ...]
    frequency: Mapping[str, float]
    categories: Mapping[str, str]
    encoders: Mapping[str, tuple[str, ...]]
    triggers: Mapping[str, tuple[str, ...]]
    bases: Mapping[str, str]


def advise(found: Findings) -> tuple[Advice, ...]:
    """Everything the findings give reason for, files first and method last."""
    rules = (_files, _prompt, _weights, _order, _method, _schedule)
    return tuple(advice for rule in rules for advice in rule(found))


def _files(found: Findings) -> Iterator[Advice]:
    for name, norm in zip(found.names, found.norms, strict=True):
        if norm == 0:
            yield Advice("file", f"leave out {name}", "it does not change the denoiser at all")
    for (i, j), shared in found.overlaps.items():
        if not shared and found.norms[i] and found.norms[j]:
            yield Advice(
                "file",
                f"check that {found.names[i]} and {found.names[j]} are for the same model",
                "they change no module in common",
            )
    for name, spikes in found.spikes.items():
        if spikes:
            loud = spikes[0]
            yield Advice(
                "file",
                f"use {name} alone, or tame it first: cmlora compress --method clip",
                f"{len(spikes)} of its updates are one loud direction; in {loud.module} it holds "
                f"{loud.share:.0%} of the energy at {loud.lift:.1f} times the usual strength",
            )
    if len(set(found.bases.values())) > 1:
        listed = ", ".join(f"{name} on {base}" for name, base in found.bases.items())
        yield Advice("file", "compare on one base model first", f"trained on several: {listed}")
    with_text = [name for name, encoders in found.encoders.items() if encoders]
    if with_text and len(with_text) < len(found.names):
        yield Advice(
            "file",
            f"try with and without the text-encoder part of {', '.join(with_text)}",
            "the other LoRAs were trained with unchanged text encoders and then read a prompt "
            "they have not seen",
        )


def _prompt(found: Findings) -> Iterator[Advice]:
    for phrase, names in found.triggers.items():
        yield Advice(
            "prompt",
            f"call {' and '.join(names)} by different words",
            f"'{phrase}' calls all of them",
        )


def _weights(found: Findings) -> Iterator[Advice]:
    suggested = weights(found.norms)
    if any(weight < 1 for weight in suggested):
        audible = [norm for norm in found.norms if norm > 0]
        listed = ", ".join(
            f"{name}:{weight:g}" for name, weight in zip(found.names, suggested, strict=True)
        )
        yield Advice(
            "weights",
            f"start from {listed}",
            f"the largest is {max(audible) / min(audible):.1f} times the smallest; beyond {LOUD:g} "
            "the small ones tend to vanish",
        )
    strength = stacking(found.whole, suggested)
    if strength > TOO_LOUD:
        yield Advice(
            "weights",
            f"multiply all weights by {1 / strength:.2f} if they are merged",
            f"added up they are {strength:.2f} times as strong as LoRAs that do not interact",
        )


def turns(found: Findings) -> tuple[list[str], str] | None:
    """The names in the order in which they should act, and why; nothing where nothing is known."""
    measured = {name: found.frequency[name] for name in found.names if name in found.frequency}
    if len(measured) == len(found.names) > 1:
        ordered = sorted(found.names, key=lambda name: -measured[name])
        reason = ", ".join(f"{name} {measured[name]:.3f}" for name in ordered)
        return ordered, f"measured high-frequency shares: {reason}"
    if "background" in found.categories.values() and len(found.names) > 1:
        ordered = sorted(found.names, key=lambda n: found.categories.get(n) == "background")
        because = "backgrounds are low-frequency and come last; run cmlora profile to measure it"
        return ordered, because
    known = [value for value in found.detail if math.isfinite(value)]
    if len(known) < len(found.names) or len(known) < 2 or max(known) - min(known) < NEAR:
        return None
    depth = dict(zip(found.names, found.detail, strict=True))
    ordered = sorted(found.names, key=lambda name: -depth[name])
    reason = ", ".join(f"{name} {depth[name]:.2f}" for name in ordered)
    because = f"depth in the UNet as a guess, 1 is full resolution: {reason}; measure it with "
    return ordered, because + "cmlora profile"


def _order(found: Findings) -> Iterator[Advice]:
    known = turns(found)
    if known is not None:
        yield Advice("order", " then ".join(known[0]), known[1])


def needless(found: Findings) -> tuple[str, ...]:
    """Names of LoRAs to leave out: those that change nothing, and copies of one before them."""
    table = cosines(found.whole)
    gone: list[int] = []
    for j, norm in enumerate(found.norms):
        kept = (i for i in range(j) if i not in gone)
        if norm == 0 or any(float(table[i, j]) >= DUPLICATE for i in kept):
            gone.append(j)
    return tuple(found.names[j] for j in gone)


def rivals(found: Findings) -> tuple[tuple[str, ...], ...]:
    """Names of LoRAs of one category that also collide, or take away from each other."""
    groups: dict[str, set[int]] = {}
    for i, j in combinations(range(len(found.names)), 2):
        category = found.categories.get(found.names[i])
        if category and category == found.categories.get(found.names[j]) and clash(found, i, j):
            groups.setdefault(category, set()).update((i, j))
    return tuple(tuple(found.names[i] for i in sorted(group)) for group in groups.values())


def clash(found: Findings, i: int, j: int) -> bool:
    """Whether two LoRAs reach into each other: by cosine, or by directions beyond chance."""
    cosine = float(cosines(found.whole)[i, j])
    shared = collision(found.overlaps.get((i, j), {}))
    return not CANCELLING < cosine < COLLIDING or shared >= COLLIDING


def in_turns(names: Sequence[str]) -> str:
    """A schedule in which one of the LoRAs acts at a time, for a tenth of the run.

    >>> in_turns(["cat", "dog"])
    '[<lora:cat:1>|<lora:dog:1>:0.1]'
    """
    return f"[{'|'.join(f'<lora:{name}:1>' for name in names)}:0.1]"


def _method(found: Findings) -> Iterator[Advice]:
    if len(found.names) < 2:
        return
    table = cosines(found.whole)
    clashes = False
    for i, j in combinations(range(len(found.names)), 2):
        one, other, cosine = found.names[i], found.names[j], float(table[i, j])
        excess = collision(found.overlaps.get((i, j), {}))
        if cosine >= DUPLICATE:
            yield Advice("method", f"use one of {one} and {other}", f"their cosine is {cosine:.2f}")
        elif cosine <= CANCELLING:
            clashes = True
            yield Advice(
                "method",
                f"never merge {one} with {other}: with gate each place follows one of them, with "
                "select or switch each has passes or steps of its own",
                f"their cosine is {cosine:.2f}: each takes away a part of the other",
            )
        elif cosine >= COLLIDING or excess >= COLLIDING:
            clashes = True
            yield Advice(
                "method",
                f"do not add up {one} and {other}: gate keeps them apart, place by place",
                f"cosine {cosine:.2f}, {excess:.0%} of their directions shared beyond chance",
            )
    if not clashes and len(found.names) > 1:
        yield Advice(
            "method",
            "gate, in which each place follows the LoRAs that change it most; merge comes second",
            "no two LoRAs push in the same directions, which a sum needs and which is not enough",
        )


def _schedule(found: Findings) -> Iterator[Advice]:
    for i, j in combinations(range(len(found.names)), 2):
        one, other = found.names[i], found.names[j]
        category = found.categories.get(one)
        if category and category == found.categories.get(other):
            sure = clash(found, i, j)
            turn = "" if sure else f"if they mix, with --schedule '{in_turns((one, other))}'"
            yield Advice(
                "schedule",
                f"let {one} and {other} take turns {turn or 'as the recipe does, or with switch'}",
                f"both are of the category {category} and want the same place"
                + (", and their updates collide" if sure else ""),
            )
            continue
        table = {block: float(cosines(gram)[i, j]) for block, gram in found.blocks.items()}
        worst = max(table, key=lambda block: (abs(table[block]), block), default="")
        whole = float(cosines(found.whole)[i, j])
        if worst and abs(table[worst]) >= COLLIDING > abs(whole):
            yield Advice(
                "schedule",
                f"let {one} and {other} take turns if they mix: switch",
                f"they meet in {worst} only, with a cosine of {table[worst]:.2f}",
            )


def collision(overlaps: Mapping[str, Overlap]) -> float:
    """Shared directions beyond chance, averaged over the blocks that both LoRAs change."""
    rows: Sequence[Overlap] = list(overlaps.values())
    return sum(row.excess for row in rows) / len(rows) if rows else 0.0
