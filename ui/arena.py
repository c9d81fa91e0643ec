"""Blind pairs of pictures, votes, and what the votes say about the methods."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np

from cmlora import checks
from cmlora.atomic import replacing
from cmlora.errors import CmloraError
from cmlora.ui.comparing import FOLDER
from cmlora.ui.shelf import unknown
from cmlora.ui.studio import Studio

Choice = Literal["left", "right", "tie"]

QUESTION = "preference"
"""What the votes answer, in exported files."""

_PRIOR = 0.1  # wins and losses added per pair, so that a method that never lost has a place
_DRAWS = 400


@dataclass(frozen=True)
class Entry:
    """A picture that takes part.

    Args:
        id: its file's name.
        contender: the row it is from: usually a method.
        unit: the column it is from; only pictures of one column meet.
        metrics: its scores.
    """

    id: str
    contender: str
    unit: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Duel:
    """Two pictures to choose from.

    Args:
        left: shown to the left.
        right: shown to the right.
    """

    left: Entry
    right: Entry


@dataclass(frozen=True)
class Vote:
    """A decision.

    Args:
        duel: what was shown.
        choice: ``left``, ``right`` or ``tie``.
    """

    duel: Duel
    choice: Choice

    @property
    def points(self) -> float:
        """Of the left picture: 1 for a win, half for a tie."""
        return {"left": 1.0, "right": 0.0, "tie": 0.5}[self.choice]


@dataclass(frozen=True)
class Standing:
    """Where a contender stands.

    Args:
        name: of the contender.
        votes: how many there were about it.
        wins: of these, ties counted as half.
        elo: rating after the votes in their order, from 1000.
        rating: Bradley-Terry strength on the same scale, mean 1000.
        low: lower end of its 95 % bootstrap interval.
        high: upper end.
    """

    name: str
    votes: int
    wins: float
    elo: float
    rating: float
    low: float
    high: float


def runs(studio: Studio) -> list[str]:
    """The comparisons on disk, the newest first."""
    place = studio.settings.out / FOLDER
    try:
        folders = [path for path in place.iterdir() if (path / "results.json").is_file()]
    except OSError:
        return []
    return sorted((path.name for path in folders if not path.is_symlink()), reverse=True)


def entries(studio: Studio, run: object) -> list[Entry]:
    """The pictures of a comparison.

    Raises:
        CmloraError: if there is none of that name, or its results cannot be read.
    """
    known = runs(studio)
    if not isinstance(run, str) or run not in known:
        raise CmloraError(unknown("comparison", run, known))
    folder = studio.settings.out / FOLDER / run
    try:
        table = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        found = [
            Entry(
                plain_file(row["file"]),
                table["rows"][row["row"]],
                table["columns"][row["column"]],
                {k: float(v) for k, v in row["scores"].items()},
            )
            for row in table["cells"]
        ]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise CmloraError(f"the results of {run} cannot be read") from None
    return [entry for entry in found if (folder / entry.id).is_file()]


def plain_file(name: Any) -> str:
    """The name of a file without folders, or a refusal."""
    if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
        raise ValueError("not a plain name")
    return name


def duels(found: Sequence[Entry], seed: int) -> list[Duel]:
    """Every pair of pictures that share a column, in an order and with sides drawn by the seed.

    >>> a, b = Entry("1.png", "merge", "seed 0", {}), Entry("2.png", "switch", "seed 0", {})
    >>> len(duels([a, b], seed=1))
    1
    """
    random = Random(seed)
    pairs = [
        (one, other)
        for one, other in combinations(found, 2)
        if one.unit == other.unit and one.contender != other.contender
    ]
    random.shuffle(pairs)
    return [Duel(*(pair if random.random() < 0.5 else pair[::-1])) for pair in pairs]


def standings(votes: Sequence[Vote], seed: int = 0) -> list[Standing]:
    """The contenders of the votes, the strongest first.

    The interval draws whole votes with replacement; with few votes it is as wide as it should be.

    Args:
        votes: in the order in which they were given.
        seed: of the bootstrap.
    """
    names = sorted({e.contender for v in votes for e in (v.duel.left, v.duel.right)})
    if not names:
        return []
    place = {name: index for index, name in enumerate(names)}
    rows = np.array(
        [(place[v.duel.left.contender], place[v.duel.right.contender], v.points) for v in votes]
    )
    random = np.random.default_rng(seed)
    draws = random.integers(0, len(rows), (_DRAWS, len(rows)))
    draws[0] = np.arange(len(rows))  # the votes themselves
    drawn = strengths(np.stack([_wins(rows[draw], len(names)) for draw in draws]))
    ratings = drawn[0]
    low, high = np.quantile(drawn[1:], (0.025, 0.975), axis=0)
    rated = elo(votes)
    found = []
    for name, index in place.items():
        points = [v.points for v in votes if v.duel.left.contender == name]
        points += [1 - v.points for v in votes if v.duel.right.contender == name]
        numbers = (float(ratings[index]), float(low[index]), float(high[index]))
        found.append(Standing(name, len(points), sum(points), rated[name], *numbers))
    return sorted(found, key=lambda standing: (-standing.rating, standing.name))


def elo(votes: Sequence[Vote], step: float = 32.0) -> dict[str, float]:
    """Elo ratings after the votes in their order, everybody from 1000.

    The expected score of a against b is 1 / (1 + 10^((R_b - R_a) / 400)).
    """
    ratings: dict[str, float] = {}
    for vote in votes:
        left, right = vote.duel.left.contender, vote.duel.right.contender
        a, b = ratings.setdefault(left, 1000.0), ratings.setdefault(right, 1000.0)
        gain = step * (vote.points - 1 / (1 + 10 ** ((b - a) / 400)))
        ratings[left], ratings[right] = a + gain, b - gain
    return ratings


def scores(votes: Sequence[Vote], rater: str) -> dict[str, Any]:
    """The votes as a file of scores that `cmlora evaluate correlate` reads.

    A picture's human score is its share of won votes, ties counted as half.

    Args:
        votes: of one person.
        rater: that person's name.

    Raises:
        CmloraError: if there are no votes, or the name is no text.
    """
    checks.text("votes", "rater", rater, empty=False)
    if not votes:
        raise CmloraError("there are no votes yet")
    won: dict[str, list[float]] = {}
    known: dict[str, Entry] = {}
    for vote in votes:
        for entry, points in ((vote.duel.left, vote.points), (vote.duel.right, 1 - vote.points)):
            won.setdefault(entry.id, []).append(points)
            known[entry.id] = entry
    items = [
        {
            "id": entry.id,
            "method": entry.contender,
            "set": entry.unit,
            "human": {QUESTION: {rater: math.fsum(won[entry.id]) / len(won[entry.id])}},
            "metrics": dict(entry.metrics),
        }
        for entry in known.values()
    ]
    return {"cmlora_scores": 1, "items": items}


def export(studio: Studio, run: str, votes: Sequence[Vote], rater: str) -> Path:
    """Write the votes beside the pictures of their comparison.

    Raises:
        CmloraError: if there are no votes, or no such comparison.
    """
    table = scores(votes, rater)
    if run not in runs(studio):
        raise CmloraError(unknown("comparison", run, runs(studio)))
    path = studio.settings.out / FOLDER / run / "votes.json"
    with replacing(path) as file:
        file.write(json.dumps(table, indent=1, ensure_ascii=False).encode())
    return path


def strengths(wins: Any, rounds: int = 400) -> Any:
    """Bradley-Terry strengths on Elo's scale, mean 1000, by maximum likelihood.

    Hunter's MM algorithm (2004): p_i = W_i / sum_j n_ij / (p_i + p_j), for all tables at once.

    Args:
        wins: (D, N, N), how often row beat column; ties are half a win for both.
        rounds: of the iteration.

    Returns:
        (D, N).
    """
    met = (wins + wins.swapaxes(1, 2)) > 0
    wins = wins + _PRIOR * met
    games, won = wins + wins.swapaxes(1, 2), wins.sum(2)
    p = np.ones(won.shape)
    for _ in range(rounds):
        weight = (games / (p[:, :, None] + p[:, None, :])).sum(2)
        p = np.where(weight > 0, won / np.where(weight > 0, weight, 1), p)
        p = p / np.exp(np.log(p).mean(1, keepdims=True))
    return 1000 + np.log(p) * 400 / math.log(10)


def _wins(rows: Any, count: int) -> Any:
    """How often row beat column, (N, N), from (left, right, points of left)."""
    wins = np.zeros((count, count))
    left, right = rows[:, 0].astype(int), rows[:, 1].astype(int)
    np.add.at(wins, (left, right), rows[:, 2])
    np.add.at(wins, (right, left), 1 - rows[:, 2])
    return wins
