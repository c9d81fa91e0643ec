"""How well pairs of LoRAs get along, from the scores of some of the pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cmlora.adapters.compression.completion import complete
from cmlora.errors import CmloraError

_RIDGE = 1e-2
_HELD_OUT = 0.2
_SMALLEST = 8


class Guess(NamedTuple):
    """A pair that was not measured, and the score it is expected to have."""

    one: str
    other: str
    score: float


class Guesses(NamedTuple):
    """Expected scores, best first.

    Args:
        rank: of the completed table.
        error: root mean square on scores that were held out; the mean alone would have `plain`.
            Both are absent if too few scores are known to hold any out.
        plain: the same for the mean of all known scores.
        pairs: all that were not measured.
    """

    rank: int
    error: float | None
    plain: float | None
    pairs: tuple[Guess, ...]


def predict(
    names: Sequence[str], scores: Mapping[tuple[str, str], float], seed: int = 0
) -> Guesses:
    """Complete the symmetric table of pair scores.

    The mean is taken out, so that a LoRA of which nothing is known is average; the rank, 0 to 3,
    is the one that does best on a fifth of the scores that it has not seen.

    Args:
        names: N LoRAs.
        scores: by pair, in either order; larger is better.
        seed: of the choice which scores are held out.

    Raises:
        CmloraError: if no score is given, a name is not in the library, a LoRA is paired with
            itself, or a pair has two scores.
    """
    index = {name: i for i, name in enumerate(names)}
    known: dict[tuple[int, int], float] = {}
    for (one, other), score in scores.items():
        for name in (one, other):
            if name not in index:
                raise CmloraError(f"a score is given for {name}, which is not in the library")
        if one == other:
            raise CmloraError(f"{one} is paired with itself")
        pair = (min(index[one], index[other]), max(index[one], index[other]))
        if pair in known:
            raise CmloraError(f"{one} and {other} have two scores")
        known[pair] = score
    if not known:
        raise CmloraError("no pair has a score; measure about a third of them")
    rank, error, plain = _choose(len(names), known, seed)
    table = _table(len(names), known, rank)
    guesses = [
        Guess(names[i], names[j], float(table[i, j]))
        for i in range(len(names))
        for j in range(i + 1, len(names))
        if (i, j) not in known
    ]
    guesses.sort(key=lambda guess: (-guess.score, guess.one, guess.other))
    return Guesses(rank, error, plain, tuple(guesses))


def _choose(
    count: int, known: Mapping[tuple[int, int], float], seed: int
) -> tuple[int, float | None, float | None]:
    if len(known) < _SMALLEST:
        return 0, None, None
    pairs = sorted(known)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    out = [pairs[i] for i in order[: max(1, round(_HELD_OUT * len(pairs)))]]
    rest = {pair: score for pair, score in known.items() if pair not in out}
    errors = []
    for rank in range(min(3, count) + 1):
        table = _table(count, rest, rank)
        missed = [(float(table[pair]) - known[pair]) ** 2 for pair in out]
        errors.append((sum(missed) / len(missed)) ** 0.5)
    rank = min(range(len(errors)), key=lambda k: (errors[k], k))
    return rank, errors[rank], errors[0]


def _table(count: int, known: Mapping[tuple[int, int], float], rank: int) -> Tensor:
    """(N, N) of expected scores; rank 0 is the mean everywhere."""
    mean = sum(known.values()) / len(known)
    if not rank:
        return torch.full((count, count), mean, dtype=torch.double)
    values = torch.zeros(count, count, dtype=torch.double)
    mask = torch.zeros(count, count, dtype=torch.bool)
    for (i, j), score in known.items():
        values[i, j] = values[j, i] = score - mean
        mask[i, j] = mask[j, i] = True
    u, v = complete(values, mask, rank, ridge=_RIDGE)
    product = u @ v.T
    return mean + (product + product.T) / 2
