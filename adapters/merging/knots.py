"""Merging in a shared output basis: what agrees in different coordinates lines up first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cmlora.adapters.merging.agree import Sign
from cmlora.adapters.merging.factors import RESOLUTION, Pair, principal
from cmlora.adapters.merging.method import Modules, Outcome, share
from cmlora.adapters.merging.sparse import combine
from cmlora.adapters.merging.sparsify import largest, random


def knots_ties(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    density: float = 0.5,
    sign: Sign = "total",
    signed_vote: bool = False,
    scope: Literal["module", "all"] = "module",
    limits: Sequence[float] | None = None,
) -> Outcome:
    """TIES on the coordinates of every LoRA in the basis of all.

    [D_1 ... D_n] = U S [V_1 ... V_n]^T; the matrices S V_j^T (K, M) are trimmed, elected and
    averaged, and U brings them back (arXiv:2410.19735). K is at most the sum of the ranks, so
    nothing is lost to truncation. The published setting is ``scope="all"``, ``density=0.2`` and
    every weight 0.6, its coefficient.

    Args:
        pairs: factors.
        weights: of the entries that are averaged.
        density: share of the entries that are kept.
        sign: see `cmlora.adapters.merging.agree.elect`.
        signed_vote: see there.
        scope: ``module`` keeps that share in every module, ``all`` the largest entries of a LoRA
            over all its modules, so that some lose everything.
        limits: with ``all``, by LoRA the least magnitude that is kept, see `thresholds`.
    """
    share("density", density)
    basis, tasks = aligned(pairs)
    if scope == "module":
        kept = [largest(t, density) for t in tasks]
    else:
        least = limits or thresholds(lambda: iter([dict(enumerate(pairs))]), len(pairs), density)
        kept = [t * (_bits(t) >= _bits(torch.tensor(x))) for t, x in zip(tasks, least, strict=True)]
    merged, notes = combine(kept, weights, (sign, signed_vote))
    return Outcome(Pair(basis, merged), notes)


def knots_dare(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    generator: torch.Generator,
    density: float = 0.5,
) -> Outcome:
    """Random entries of those coordinates, scaled up and added.

    The published setting is ``density=0.9`` and every weight 0.7, with signs elected after.
    """
    share("density", density)
    basis, tasks = aligned(pairs)
    merged, notes = combine([random(t, density, generator) for t in tasks], weights, None)
    return Outcome(Pair(basis, merged), notes)


def survey(modules: Modules, count: int, options: Mapping[str, Any]) -> list[float] | None:
    """The limits of ``knots_ties`` if it trims all modules together."""
    if options.get("scope") != "all":
        return None
    density = options.get("density", 0.5)
    share("density", density)
    return thresholds(modules, count, density)


def thresholds(modules: Modules, count: int, density: float) -> list[float]:
    """By LoRA the magnitude of the last of the int(density * entries) largest coordinates.

    A LoRA that leaves a module alone has zeros there, which count as entries. Nothing is kept
    between modules: single-precision numbers that are not negative sort as their bits do, so that
    counting the upper half of the bits, and then the lower half in one place, finds the number.

    Args:
        modules: goes through all modules.
        count: how many LoRAs there are.
        density: share of the entries that are kept.
    """
    entries, upper = 0, torch.zeros(count, 2**15, dtype=torch.long)
    lower = torch.zeros(count, 2**16, dtype=torch.long)
    for pairs in modules():
        _, tasks = aligned(list(pairs.values()))
        entries += tasks[0].numel()
        for index, task in zip(pairs, tasks, strict=True):
            upper[index] += torch.bincount(_bits(task).flatten() >> 16, minlength=2**15)
    keep = int(density * entries)
    above = [_last(row, keep) for row in upper]
    for pairs in modules():
        _, tasks = aligned(list(pairs.values()))
        for index, task in zip(pairs, tasks, strict=True):
            bits = _bits(task).flatten()
            inside = bits[bits >> 16 == above[index][0]] & 0xFFFF
            lower[index] += torch.bincount(inside, minlength=2**16)
    found = []
    for (place, left), row in zip(above, lower, strict=True):
        number = torch.tensor((place << 16) + _last(row, left)[0], dtype=torch.int32)
        found.append(float(number.view(torch.float32)))
    return found


def _last(counts: Tensor, keep: int) -> tuple[int, int]:
    """The highest place with at least ``keep`` at or above it, and how many of them are in it."""
    reached = counts.flip(0).cumsum(0).flip(0)
    place = max(int((reached >= keep).sum()) - 1, 0)
    return place, keep - int(reached[place] - counts[place])


def _bits(values: Tensor) -> Tensor:
    """Magnitudes in single precision, as whole numbers of the same order."""
    return values.abs().float().view(torch.int32).long()


def aligned(pairs: Sequence[Pair]) -> tuple[Tensor, list[Tensor]]:
    """U (O, K) with orthonormal columns and the coordinates (K, M) of every LoRA in it."""
    beside = torch.cat([pair.up for pair in pairs], 1)
    sizes = [pair.rank for pair in pairs]
    within = torch.block_diag(*(pair.grams[1] for pair in pairs))  # type: ignore[no-untyped-call]
    quick = principal(beside, beside.T @ beside, within)
    if quick is not None:
        basis, cores = quick[0], torch.split_with_sizes(quick[1], sizes, 1)
        return basis, [c @ pair.down for c, pair in zip(cores, pairs, strict=True)]
    left, core = torch.linalg.qr(beside)
    cores = core.split(sizes, 1)
    # The right factors only turn what stands next to each other: their triangles are enough.
    triangles = [torch.linalg.qr(pair.down.T).R.T for pair in pairs]
    beside = torch.cat([c @ t for c, t in zip(cores, triangles, strict=True)], 1)
    u, s, _ = torch.linalg.svd(beside, full_matrices=False)
    turn = u[:, s > RESOLUTION * s.max()]
    tasks = [(turn.T @ c) @ pair.down for c, pair in zip(cores, pairs, strict=True)]
    return left @ turn, tasks
