"""The numbers of a report: one interval per metric, method and N, and what differs from what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from cmlora.errors import CmloraError
from cmlora.eval.manifest import set_id
from cmlora.eval.metrics import METRICS, Metric, metric_of
from cmlora.eval.report.selection import Selection
from cmlora.eval.scoring import Score, latest
from cmlora.eval.statistics import (
    Interval,
    holm,
    mean_interval,
    sign_flip,
    stratified_interval,
    wilcoxon,
)
from cmlora.eval.study import Record, Study
from cmlora.strategies import METHODS

Place = tuple[str, int]
"""A set and a seed: what all methods share."""

BASELINE = "merge"
FOCUS = "cmlora@nonuniform"
ALPHA = 0.05
EVERYTHING = Selection()


@dataclass(frozen=True)
class Difference:
    """A method against the baseline.

    Args:
        value: of the means, method less baseline.
        p: of the sign-flip test over sets, corrected by Holm for the number of methods.
        better: whether the method is better; ``None`` if no difference is shown, or the metric
            has no good side.
        wilcoxon: p of Wilcoxon's signed-rank test over sets, not corrected.
        interval: of the value, over sets.
    """

    value: float
    p: float
    better: bool | None
    wilcoxon: float
    interval: Interval


@dataclass
class Summary:
    """Scores arranged by metric, method, N, set and seed.

    Args:
        values: by metric, then label, then N, then place.
        concepts: by mark, then label, then LoRA id, then place.
        categories: of the LoRAs, by id.
        records: of the run.
        versions: of the scorers.
    """

    values: dict[str, dict[str, dict[int, dict[Place, float]]]] = field(default_factory=dict)
    concepts: dict[str, dict[str, dict[str, dict[Place, float]]]] = field(default_factory=dict)
    categories: dict[str, str] = field(default_factory=dict)
    records: tuple[Record, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    _known: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False, init=False)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Methods that have pictures, in the registry's order, without caches first."""
        order = {name: place for place, name in enumerate(METHODS)}
        found = {(r.method, r.cache != "none", r.label) for r in self.records}
        ranked = sorted(found, key=lambda row: (order.get(row[0], len(order)), row))
        return tuple(label for _, _, label in ranked)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Every N that has pictures."""
        return tuple(sorted({record.n for record in self.records}))

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """What was scored, in the order of reports."""
        order = {name: place for place, name in enumerate(METRICS)}
        names = sorted(self.values, key=lambda name: (order.get(name, len(order)), name))
        return tuple(metric_of(name) for name in names)

    @property
    def quality(self) -> tuple[Metric, ...]:
        """Metrics with a good side that are no costs."""
        costs = ("gmacs", "seconds", "passes")
        return tuple(m for m in self.metrics if m.better != "neither" and m.name not in costs)

    def cell(self, metric: str, label: str, n: int | None) -> Interval:
        """A number of a table.

        Args:
            metric: its name.
            label: the method.
            n: how many LoRAs; ``None`` is the mean of all N, each N counting the same.
        """
        key = ("cell", metric, label, n)
        if key not in self._known:
            sizes = self.sizes if n is None else (n,)
            sets = [self._sets(metric, label, size) for size in sizes]
            self._known[key] = mean_interval(sets[0]) if n else stratified_interval(sets)
        found: Interval = self._known[key]
        return found

    def differences(self, metric: str, baseline: str, n: int | None) -> dict[str, Difference]:
        """Every other method against one, on the pictures that both have.

        Args:
            metric: its name.
            baseline: the method to compare with.
            n: how many LoRAs; ``None`` is the mean of all N.
        """
        key = ("differences", metric, baseline, n)
        if key not in self._known:
            self._known[key] = self._differences(metric, baseline, n)
        found: dict[str, Difference] = self._known[key]
        return found

    def _differences(self, metric: str, baseline: str, n: int | None) -> dict[str, Difference]:
        sizes = self.sizes if n is None else (n,)
        raw: dict[str, tuple[float, float, Interval]] = {}
        for label in self.labels:
            paired = [self._paired(metric, label, baseline, size) for size in sizes]
            strata = [found for found in paired if found]
            if label != baseline and strata:
                # equal weight per N: the statistic is the sum of what is flipped
                d = np.array([value / len(found) for found in strata for value in found])
                interval = mean_interval(strata[0]) if n else stratified_interval(strata)
                raw[label] = (sign_flip(d), wilcoxon(d), interval)
        corrected = holm({label: p for label, (p, _, _) in raw.items()})
        return {
            label: Difference(
                interval.value, p, _better(metric, interval.value, p), ranks, interval
            )
            for label, (_, ranks, interval) in raw.items()
            for p in [corrected[label]]
        }

    def survival(self, mark: str, label: str, category: str) -> Interval:
        """Mean of a concept's mark over a category's LoRAs, per set it takes part in."""
        pooled: dict[str, list[float]] = {}
        for id_, places in self.concepts.get(mark, {}).get(label, {}).items():
            if self.categories.get(id_) == category:
                for (ids, _), value in places.items():
                    pooled.setdefault(ids, []).append(value)
        return mean_interval([sum(v) / len(v) for _, v in sorted(pooled.items())])

    def wins(self, metric: str) -> dict[tuple[str, str], tuple[int, int, int]]:
        """How often a method's picture is better, equal, worse than another's of the same place."""
        sign = -1 if metric_of(metric).better == "less" else 1
        found = {}
        for one in self.labels:
            for other in self.labels:
                pairs = [
                    sign * (value - theirs[place])
                    for n, places in self.values.get(metric, {}).get(one, {}).items()
                    for theirs in [self.values[metric].get(other, {}).get(n, {})]
                    for place, value in places.items()
                    if place in theirs
                ]
                if one != other and pairs:
                    counts = [sum(1 for d in pairs if _sign(d) == s) for s in (1, 0, -1)]
                    found[one, other] = (counts[0], counts[1], counts[2])
        return found

    def missing(self) -> list[str]:
        """What a reader must know of pictures that are not there."""
        said = []
        for n in self.sizes:
            counts = {
                label: sum(1 for r in self.records if r.label == label and r.n == n)
                for label in self.labels
            }
            if len(set(counts.values())) > 1:
                few = ", ".join(f"{label} {count}" for label, count in counts.items())
                said.append(f"the methods do not have equally many pictures for N = {n} ({few})")
        others = len(self.labels) - 1
        sets = {n: len({r.ids for r in self.records if r.n == n}) for n in self.sizes}
        # 2^(1 - sets) is the least p there is, and Holm multiplies it
        short = [str(n) for n, count in sets.items() if others * 2.0 ** (1 - count) >= ALPHA]
        if others and short:
            said.append(
                f"for N = {', '.join(short)} there are too few sets to show any difference "
                f"between {len(self.labels)} methods"
            )
        return said

    def _sets(self, metric: str, label: str, n: int) -> list[float]:
        places = self.values.get(metric, {}).get(label, {}).get(n, {})
        by_set: dict[str, list[float]] = {}
        for (ids, _), value in places.items():
            by_set.setdefault(ids, []).append(value)
        return [sum(values) / len(values) for _, values in sorted(by_set.items())]

    def _paired(self, metric: str, label: str, baseline: str, n: int) -> list[float]:
        ours = self.values.get(metric, {}).get(label, {}).get(n, {})
        theirs = self.values.get(metric, {}).get(baseline, {}).get(n, {})
        by_set: dict[str, list[float]] = {}
        for place, value in ours.items():
            if place in theirs:
                by_set.setdefault(place[0], []).append(value - theirs[place])
        return [sum(values) / len(values) for _, values in sorted(by_set.items())]


def summarise(study: Study, selection: Selection = EVERYTHING) -> Summary:
    """Arrange a run's scores; costs come from the records themselves.

    Args:
        study: the run.
        selection: which of its pictures.

    Raises:
        CmloraError: if the run has no finished job, or none of the selection.
    """
    manifest = study.manifest
    records = tuple(study.records().values())
    if not records:
        raise CmloraError(f"{study.folder} has no finished job yet")
    records = selection.of(records)
    by_key = {record.key: record for record in records}
    found = Summary(records=records)
    found.categories = {lora.id: lora.category for lora in manifest.loras}
    for record in records:
        costs = {"seconds": record.seconds, "passes": float(record.full + record.light)}
        if record.macs is not None:
            costs["gmacs"] = record.macs / 1e9
        _add(found, record, costs)
    for score in latest(study):
        if score.key not in by_key or score.scorer == "cost":
            continue
        record = by_key[score.key]
        found.versions[score.scorer] = score.version
        _add(found, record, score.values)
        _add_concepts(found, record, score)
    return found


def findings(summary: Summary, focus: str) -> list[str]:
    """What the numbers say of one method, in sentences; also where it loses.

    Args:
        summary: the numbers.
        focus: the method's label.
    """
    said = []
    for metric in summary.quality:
        own = summary.cell(metric.name, focus, None)
        if own.count == 0:
            continue
        better: list[str] = []
        worse: list[str] = []
        open_: list[str] = []
        for label, difference in summary.differences(metric.name, focus, None).items():
            # a difference is of the other method, so its gain is the focus's loss
            place = {True: worse, False: better, None: open_}[difference.better]
            place.append(f"`{label}`")
        parts = [
            f"{words} {', '.join(names)}"
            for words, names in (("better than", better), ("worse than", worse))
            if names
        ]
        if open_:
            parts.append(f"no difference is shown to {', '.join(open_)}")
        value = f"{own.value:.{metric.digits}f}"
        said.append(f"By {metric.title}, `{focus}` ({value}): {'; '.join(parts)}.")
    return said


def focus_of(summary: Summary, wanted: str | None = None) -> str:
    """The method that findings are about.

    Raises:
        CmloraError: if the one asked for has no pictures.
    """
    if wanted is not None:
        if wanted not in summary.labels:
            raise CmloraError(f"no pictures of {wanted!r}; there are {', '.join(summary.labels)}")
        return wanted
    cached = [label for label in summary.labels if label.startswith("cmlora")]
    return FOCUS if FOCUS in summary.labels else (cached or list(summary.labels))[-1]


def baseline_of(summary: Summary, wanted: str | None = None) -> str:
    """The method that others are compared with.

    Raises:
        CmloraError: if the one asked for has no pictures.
    """
    if wanted is None:
        return BASELINE if BASELINE in summary.labels else summary.labels[0]
    return focus_of(summary, wanted)


def _add(found: Summary, record: Record, values: Mapping[str, float]) -> None:
    place = (set_id(record.ids), record.seed)
    for name, value in values.items():
        by_label = found.values.setdefault(name, {})
        by_label.setdefault(record.label, {}).setdefault(record.n, {})[place] = value


def _add_concepts(found: Summary, record: Record, score: Score) -> None:
    place = (set_id(record.ids), record.seed)
    for id_, marks in score.concepts.items():
        for mark, value in marks.items():
            by_label = found.concepts.setdefault(mark, {})
            by_label.setdefault(record.label, {}).setdefault(id_, {})[place] = value


def _better(metric: str, value: float, p: float) -> bool | None:
    good = metric_of(metric).better
    if good == "neither" or p >= ALPHA or value == 0:
        return None
    return (value > 0) == (good == "more")


def _sign(value: float) -> int:
    return 0 if abs(value) < 1e-12 or math.isnan(value) else (1 if value > 0 else -1)
