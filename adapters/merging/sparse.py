"""The sparsifying family: what stays of every LoRA, times how the rest is put together.

All of them need entries, so a matrix is formed; the result is cut to a rank afterwards. With
``space="factor"`` both factors are treated as matrices of their own, as PEFT does. ``align`` then
brings the rank units of all LoRAs into step with those of the first, see
`cmlora.adapters.merging.align.align_pair`; PEFT takes them as they come, which is ``align="none"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from cmlora.adapters.compression.completion import complete
from cmlora.adapters.merging.agree import Sign, add, elect
from cmlora.adapters.merging.align import Align, align_pair
from cmlora.adapters.merging.factors import Pair
from cmlora.adapters.merging.kept import Kept, blocks
from cmlora.adapters.merging.method import Outcome, share
from cmlora.adapters.merging.sparsify import by_rank, largest, middle, random
from cmlora.errors import CmloraError

Space = Literal["delta", "factor"]


def magnitude(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    density: float = 0.5,
    space: Space = "delta",
    align: Align = "permute",
) -> Outcome:
    """The largest entries of every LoRA, added up."""
    share("density", density)
    return _merge(pairs, weights, lambda t: largest(t, density), space, align)


def dare_linear(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    generator: torch.Generator,
    density: float = 0.5,
    space: Space = "delta",
    align: Align = "permute",
) -> Outcome:
    """Random entries of every LoRA, scaled up for the missing ones and added (arXiv:2311.03099)."""
    share("density", density)
    return _merge(pairs, weights, lambda t: random(t, density, generator), space, align)


def dare_ties(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    generator: torch.Generator,
    density: float = 0.5,
    sign: Sign = "total",
    signed_vote: bool = False,
    space: Space = "delta",
    align: Align = "permute",
) -> Outcome:
    """Random entries of every LoRA, scaled up, averaged where signs agree."""
    share("density", density)
    keep: Callable[[Tensor], Tensor] = lambda t: random(t, density, generator)  # noqa: E731
    return _merge(pairs, weights, keep, space, align, (sign, signed_vote))


def ties(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    density: float = 0.5,
    sign: Sign = "total",
    signed_vote: bool = False,
    space: Space = "delta",
    align: Align = "permute",
    rank: int | None = None,
    fill: bool = False,
) -> Outcome:
    """Trim to the largest entries, elect a sign per place, average what agrees.

    Args:
        pairs: factors.
        weights: of the entries that are averaged.
        density: share of the entries that are kept.
        sign: see `cmlora.adapters.merging.agree.elect`.
        signed_vote: see there.
        space: ``delta`` (the paper's), or ``factor`` for up and down apart.
        align: of rank units, before factors are merged.
        rank: of the result where entries are filled in; the largest of the LoRAs' if not given.
        fill: take what was trimmed or lost the election for unknown instead of zero, and complete
            it at the rank, which is slow. For LoRAs whose trimmed entries were no noise.
    """
    share("density", density)
    if fill and space == "factor":
        raise CmloraError("fill completes updates, so that it needs space=delta")
    keep: Callable[[Tensor], Tensor] = lambda t: largest(t, density)  # noqa: E731
    found = _merge(pairs, weights, keep, space, align, (sign, signed_vote))
    if not fill:
        return found
    value, notes = found
    assert isinstance(value, Tensor)
    target = min(rank or max(pair.rank for pair in pairs), *value.shape)
    known = value != 0
    if not bool(known.any()):
        return found
    u, v = complete(value, known, target)
    return Outcome(Pair(u, v.T), {**notes, "known": float(known.double().mean())})


def della(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    generator: torch.Generator,
    density: float = 0.5,
    epsilon: float = 0.2,
    sign: Sign = "total",
    signed_vote: bool = False,
) -> Outcome:
    """Random entries, larger ones more often, averaged where signs agree."""
    share("density", density)
    share("epsilon", epsilon, zero=True)
    if density - epsilon / 2 <= 0:
        raise CmloraError(f"epsilon {epsilon:g} is at least twice the density {density:g}")
    keep: Callable[[Tensor], Tensor] = lambda t: by_rank(t, density, epsilon, generator)  # noqa: E731
    return _merge(pairs, weights, keep, election=(sign, signed_vote))


def breadcrumbs(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    density: float = 0.5,
    gamma: float = 0.01,
) -> Outcome:
    """All but the very largest and the small entries of every LoRA, added up."""
    share("density", density)
    share("gamma", gamma, zero=True)
    return _merge(pairs, weights, lambda t: middle(t, density, gamma))


def breadcrumbs_ties(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    *,
    density: float = 0.5,
    gamma: float = 0.01,
    sign: Sign = "total",
    signed_vote: bool = False,
) -> Outcome:
    """All but the very largest and the small entries, averaged where signs agree."""
    share("density", density)
    share("gamma", gamma, zero=True)
    keep: Callable[[Tensor], Tensor] = lambda t: middle(t, density, gamma)  # noqa: E731
    return _merge(pairs, weights, keep, election=(sign, signed_vote))


def _merge(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    keep: Callable[[Tensor], Tensor],
    space: Space = "delta",
    align: Align = "none",
    election: tuple[Sign, bool] | None = None,
) -> Outcome:
    if space == "delta":
        value, notes = combine((keep(pair.dense()) for pair in pairs), weights, election)
        return Outcome(value, notes)
    if len({pair.rank for pair in pairs}) > 1:
        raise CmloraError("space=factor needs LoRAs of one rank")
    pairs = [align_pair(pair, pairs[0], align) for pair in pairs]
    roots = [abs(weight) ** 0.5 for weight in weights]
    signed = [root if w >= 0 else -root for root, w in zip(roots, weights, strict=True)]
    up, notes = combine((keep(pair.up) for pair in pairs), roots, election)
    down, _ = combine((keep(pair.down) for pair in pairs), signed, election)
    return Outcome(Pair(up, down), notes)


def combine(
    kept: Iterable[Tensor], weights: Sequence[float], election: tuple[Sign, bool] | None
) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum, or the mean of what agrees with its shares kept and contested.

    Args:
        kept: (O, M) each, with zeros; made one after another, so that one is whole at a time.
        weights: of their entries.
        election: the sign's rule, and whether votes are weighed; a plain sum without.
    """
    packed = list(map(Kept.of, kept))
    result = packed[0].rows(0, 1).new_empty(packed[0].shape)
    agreed = cast = contested = places = 0
    for rows, matrices in blocks(packed):
        if election is None:
            result[rows] = add(matrices, weights)
            continue
        found = elect(matrices, weights, *election)
        result[rows] = found.value
        agreed, cast = agreed + found.agreed, cast + found.cast
        contested, places = contested + found.contested, places + found.places
    if election is None:
        return result, {}
    return result, {"kept": agreed / max(cast, 1), "contested": contested / max(places, 1)}
