"""From a judge's marks to wins, win rates, rankings, and how far the judge can be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from cmlora.eval.judge.compare import answers
from cmlora.eval.manifest import set_id
from cmlora.eval.report.charts import Point
from cmlora.eval.report.tables import Table, interval_text, wins_table
from cmlora.eval.statistics import Array, Interval, bradley_terry, mean_interval, sign_flip
from cmlora.eval.study import Study

OVERALL = "overall"
DRAWS = 400
"""Bootstrap resamples of a ranking, each of which is fitted anew."""


@dataclass(frozen=True)
class Duel:
    """Two pictures that were shown in both orders, and what they got.

    Args:
        one: label of a method.
        other: label of the other.
        unit: the set.
        n: LoRAs in it.
        forward: marks (one, other) by dimension, with `one` shown first.
        backward: marks (one, other) by dimension, with `other` shown first.
        keys: of the two pictures' jobs.
    """

    one: str
    other: str
    unit: str
    n: int
    forward: Mapping[str, tuple[float, float]]
    backward: Mapping[str, tuple[float, float]]
    keys: tuple[str, str] = ("", "")

    def lead(self, dimension: str) -> float:
        """By how much `one` is ahead, mean of both orders."""
        ahead = [a - b for a, b in self._both(dimension)]
        return fmean(ahead)

    def pull(self, dimension: str) -> float:
        """By how much the picture that is shown first is ahead, whichever it is."""
        (a, b), (c, d) = self._both(dimension)
        return ((a - b) + (d - c)) / 2

    def agrees(self, dimension: str) -> bool:
        """Whether both orders have the same winner, or both none."""
        (a, b), (c, d) = self._both(dimension)
        return _sign(a - b) == _sign(c - d)

    def marks(self, dimension: str) -> tuple[float, float]:
        """Mean marks (one, other)."""
        (a, b), (c, d) = self._both(dimension)
        return (a + c) / 2, (b + d) / 2

    def _both(self, dimension: str) -> list[tuple[float, float]]:
        found = []
        for marks in (self.forward, self.backward):
            rows = [marks[dimension]] if dimension != OVERALL else list(marks.values())
            found.append((fmean(a for a, _ in rows), fmean(b for _, b in rows)))
        return found


@dataclass(frozen=True)
class Bias:
    """Whether a judge goes by the position of a picture.

    Args:
        pull: advantage of the first position, in marks, with its interval over sets.
        p: of the sign-flip test of no advantage.
        agreement: share of pairs with the same winner in both orders.
    """

    pull: Interval
    p: float
    agreement: float

    @property
    def found(self) -> bool:
        """Whether the data speak for a bias, at 5 %."""
        return self.p < 0.05


@dataclass
class Verdicts:
    """All answers of one judge to one protocol.

    Args:
        judge: its name.
        protocol: name of the protocol.
        dimensions: what was marked, and the mean of all of them.
        duels: pairs with readable answers in both orders.
        asked: questions.
        unreadable: questions without a readable answer, after the repair.
        repaired: questions that needed the repair.
        half: pairs with a readable answer in one order only; they do not count.
        cost: in the currency of the prices.
        tokens: read and written.
    """

    judge: str
    protocol: str
    dimensions: tuple[str, ...]
    duels: list[Duel] = field(default_factory=list)
    asked: int = 0
    unreadable: int = 0
    repaired: int = 0
    half: int = 0
    cost: float = 0.0
    tokens: tuple[int, int] = (0, 0)

    @property
    def slug(self) -> str:
        """For file names."""
        return "".join(c if c.isalnum() else "_" for c in f"{self.judge}_{self.protocol}")

    @property
    def labels(self) -> tuple[str, ...]:
        """Methods that were judged."""
        return tuple(sorted({name for duel in self.duels for name in (duel.one, duel.other)}))

    def wins(
        self, dimension: str, duels: Sequence[Duel] | None = None
    ) -> dict[tuple[str, str], tuple[int, int, int]]:
        """Win, tie and lose of every method against every other it met."""
        found: dict[tuple[str, str], list[int]] = {}
        for duel in self.duels if duels is None else duels:
            place = 1 - _sign(duel.lead(dimension))
            found.setdefault((duel.one, duel.other), [0, 0, 0])[place] += 1
            found.setdefault((duel.other, duel.one), [0, 0, 0])[2 - place] += 1
        return {pair: (c[0], c[1], c[2]) for pair, c in found.items()}

    def win_rate(self, label: str, dimension: str) -> Interval:
        """Share of a method's pairs that it wins, a tie counting half; intervals over sets."""
        by_unit: dict[str, list[float]] = {}
        for duel in self.duels:
            if label in (duel.one, duel.other):
                sign = _sign(duel.lead(dimension)) * (1 if duel.one == label else -1)
                by_unit.setdefault(duel.unit, []).append((1 + sign) / 2)
        return mean_interval([fmean(v) for _, v in sorted(by_unit.items())])

    def mean_marks(self, label: str, dimension: str) -> Interval:
        """A method's mean mark; intervals over sets."""
        by_unit: dict[str, list[float]] = {}
        for duel in self.duels:
            for name, mark in zip((duel.one, duel.other), duel.marks(dimension), strict=True):
                if name == label:
                    by_unit.setdefault(duel.unit, []).append(mark)
        return mean_interval([fmean(v) for _, v in sorted(by_unit.items())])

    def picture_marks(self, dimension: str) -> dict[str, float]:
        """Mean mark of every picture over its pairs, by the key of its job."""
        found: dict[str, list[float]] = {}
        for duel in self.duels:
            for key, mark in zip(duel.keys, duel.marks(dimension), strict=True):
                found.setdefault(key, []).append(mark)
        return {key: fmean(marks) for key, marks in found.items()}

    def strengths(self, dimension: str) -> dict[str, Interval]:
        """Bradley-Terry log strengths with percentile intervals, sets drawn with replacement.

        Half a win and half a loss between any two that met keep them finite.
        """
        labels, units = self.labels, sorted({duel.unit for duel in self.duels})
        if not units:
            return {}
        by_unit: dict[str, list[Duel]] = {unit: [] for unit in units}
        for duel in self.duels:
            by_unit[duel.unit].append(duel)
        stack = np.stack([self._matrix(by_unit[unit], dimension) for unit in units])
        value = bradley_terry(stack.sum(0), prior=0.5)
        bounds = np.full((2, len(labels)), math.nan)
        if len(units) > 2:
            even = np.full(len(units), 1 / len(units))
            counts = np.random.default_rng(0).multinomial(len(units), even, size=DRAWS)
            drawn = np.tensordot(counts.astype(np.float64), stack, axes=1)  # (DRAWS, N, N)
            fitted = bradley_terry(drawn, prior=0.5, tolerance=1e-6)
            bounds = np.quantile(fitted, [0.025, 0.975], axis=0)
        return {
            label: Interval(float(value[i]), float(bounds[0, i]), float(bounds[1, i]), len(units))
            for i, label in enumerate(labels)
        }

    def bias(self, dimension: str = OVERALL) -> Bias:
        """Whether the position of a picture has an influence on its marks."""
        by_unit: dict[str, list[float]] = {}
        for duel in self.duels:
            by_unit.setdefault(duel.unit, []).append(duel.pull(dimension))
        pulls = [fmean(v) for _, v in sorted(by_unit.items())]
        agree = [duel.agrees(dimension) for duel in self.duels]
        share = fmean(agree) if agree else math.nan
        return Bias(mean_interval(pulls), sign_flip(pulls), share)

    def _matrix(self, duels: Sequence[Duel], dimension: str) -> Array:
        place = {label: i for i, label in enumerate(self.labels)}
        matrix = np.zeros((len(place), len(place)))
        for (one, other), (won, tied, _) in self.wins(dimension, duels).items():
            matrix[place[one], place[other]] += won + tied / 2
        return matrix


def judged(study: Study) -> list[Verdicts]:
    """What every judge said of a run's present pictures, one entry per judge and protocol."""
    records = study.records()
    found: dict[tuple[str, str, str], Verdicts] = {}
    marks: dict[tuple[str, str, str], dict[tuple[str, str], dict[str, dict[str, float]]]] = {}
    present = {key: record.sha256 for key, record in records.items()}
    for row in answers(study):
        first, second = row["first"], row["second"]
        if [present.get(first), present.get(second)] != row["images"]:
            continue
        about = (row["judge"], row["protocol"], row["protocol_digest"] + row["examples"])
        one = found.setdefault(
            about, Verdicts(row["judge"], row["protocol"], (*row["dimensions"], OVERALL))
        )
        one.asked += 1
        one.unreadable += row["marks"] is None
        one.repaired += bool(row["repaired"])
        one.cost += row["cost"]
        one.tokens = (one.tokens[0] + row["tokens"][0], one.tokens[1] + row["tokens"][1])
        if row["marks"] is not None:
            marks.setdefault(about, {})[first, second] = row["marks"]
    for about, one in found.items():
        given = marks.get(about, {})
        for first, second in sorted(given):
            if (second, first) not in given:
                one.half += 1
            elif records[first].label <= records[second].label:
                a, b = records[first], records[second]
                if a.label == b.label and first > second:
                    continue
                forward, backward = given[first, second], given[second, first]
                one.duels.append(
                    Duel(
                        a.label,
                        b.label,
                        set_id(a.ids),
                        a.n,
                        {d: (forward["first"][d], forward["second"][d]) for d in forward["first"]},
                        {
                            d: (backward["second"][d], backward["first"][d])
                            for d in backward["first"]
                        },
                        (first, second),
                    )
                )
    return list(found.values())


def verdict_tables(verdicts: Verdicts, order: Sequence[str]) -> Iterator[str | Table]:
    """What a report says of a judge: trust first, then win matrix, win rates and ranking.

    Args:
        verdicts: of one judge.
        order: of the methods.
    """
    labels = [label for label in order if label in verdicts.labels]
    said = (
        f"`{verdicts.judge}`, protocol `{verdicts.protocol}`: {verdicts.asked} questions, "
        f"{verdicts.repaired} answers needed a repair, {verdicts.unreadable} stayed unreadable, "
        f"{verdicts.half} pairs were answered in one order only and do not count."
    )
    yield said + (f" Cost {verdicts.cost:.2f}." if verdicts.cost else "")
    if not verdicts.duels:
        return
    bias = verdicts.bias()
    pull = f"{bias.pull.value:+.2f} [{bias.pull.low:+.2f}, {bias.pull.high:+.2f}]"
    known = "The judge is biased by position" if bias.found else "No bias by position is shown"
    yield (
        f"{known}: the picture that is shown first gets {pull} marks more (p = {bias.p:.3g}); "
        f"both orders have the same winner in {bias.agreement:.0%} of the pairs. Marks are means "
        "of both orders, so the bias itself cancels."
    )
    for dimension in verdicts.dimensions:
        table = wins_table(dimension.replace("_", " "), labels, verdicts.wins(dimension))
        if table is not None:
            yield table
    rows = []
    strengths = verdicts.strengths(OVERALL)
    for label in labels:
        rate, mark = (
            verdicts.win_rate(label, OVERALL),
            verdicts.mean_marks(label, OVERALL),
        )
        cells = [(rate, 3), (mark, 2), (strengths[label], 2)]
        rows.append([f"`{label}`", *(interval_text(cell, digits) for cell, digits in cells)])
    head = ["method", "win rate", "mean mark", "Bradley-Terry"]
    yield Table(
        "Ranking, overall", head, rows, "Ties count half; 95 % bootstrap intervals over sets."
    )


def strength_rows(verdicts: Verdicts, dimension: str) -> list[tuple[str, Point]]:
    """Bradley-Terry strengths for a plot, strongest first."""
    found = verdicts.strengths(dimension)
    ranked = sorted(found, key=lambda label: -found[label].value)
    return [(k, Point(found[k].value, 0, found[k].low, found[k].high)) for k in ranked]


def _sign(value: float) -> int:
    return 0 if abs(value) < 1e-9 else (1 if value > 0 else -1)
