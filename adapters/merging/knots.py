"""Merging in a shared output basis: what agrees in different coordinates lines up first."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cmlora.adapters.merging.agree import Sign
from cmlora.adapters.merging.factors import RESOLUTION, Pair, principal
from cmlora.adapters.merging.method import Outcome, share
from cmlora.adapters.merging.sparse import combine
from cmlora.adapters.merging.sparsify import largest, random


def knots_ties(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    density: float = 0.5,
    sign: Sign = "total",
    signed_vote: bool = False,
) -> Outcome:
    """TIES on the coordinates of every LoRA in the basis of all.

    [D_1 ... D_n] = U S [V_1 ... V_n]^T; the matrices S V_j^T (K, M) are trimmed, elected and
    averaged, and U brings them back (arXiv:2410.19735). K is at most the sum of the ranks, so
    nothing is lost to truncation.
    """
    share("density", density)
    basis, tasks = aligned(pairs)
    merged, notes = combine([largest(t, density) for t in tasks], weights, (sign, signed_vote))
    return Outcome(Pair(basis, merged), notes)


def knots_dare(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    generator: torch.Generator,
    density: float = 0.5,
) -> Outcome:
    """Random entries of those coordinates, scaled up and added."""
    share("density", density)
    basis, tasks = aligned(pairs)
    merged, notes = combine([random(t, density, generator) for t in tasks], weights, None)
    return Outcome(Pair(basis, merged), notes)


def aligned(pairs: Sequence[Pair]) -> tuple[torch.Tensor, list[torch.Tensor]]:
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
