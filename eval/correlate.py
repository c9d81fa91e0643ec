"""How well metrics agree with people, from a file of both.

The file is JSON, with this schema::

    {
      "cmlora_scores": 1,
      "items": [
        {
          "id": "anything",
          "method": "merge",
          "set": "character_1+object_1",
          "human": {"composition": {"anna": 3, "ben": 4}, "quality": {"anna": 5}},
          "metrics": {"clip_score": 33.1, "judge": 7.5}
        }
      ]
    }

``human`` has one table per question, with the score of every rater who answered it. ``set`` is
optional: items of one set are not independent, so intervals draw them together. A metric may be
missing from some items.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from cmlora import checks
from cmlora.errors import CmloraError
from cmlora.eval.report.tables import NONE, Table
from cmlora.eval.statistics import (
    Correlation,
    Interval,
    correlation,
    correlation_interval,
    krippendorff,
    mean_interval,
)

FORMAT = 1
_KEY = "cmlora_scores"
_KEYS = ("id", "method", "set", "human", "metrics")


@dataclass(frozen=True)
class Rated:
    """A picture that people and metrics have judged.

    Args:
        id: of the picture.
        method: that made it.
        unit: items of one unit are not independent of each other.
        human: scores by question and rater.
        metrics: values by metric.
    """

    id: str
    method: str
    unit: str
    human: Mapping[str, Mapping[str, float]]
    metrics: Mapping[str, float]

    def mean(self, question: str) -> float | None:
        """Mean over the raters of a question, if somebody answered it."""
        given = self.human.get(question)
        return fmean(given.values()) if given else None


@dataclass(frozen=True)
class Agreement:
    """How a metric and people's scores go together.

    Args:
        metric: name of the metric.
        question: that people were asked.
        items: how many pictures have both.
        coefficients: by kind, over pictures, with intervals over units.
        methods: how many methods have both.
        between: by kind, over the methods' means; no interval, because there are so few.
    """

    metric: str
    question: str
    items: int
    coefficients: Mapping[Correlation, Interval]
    methods: int
    between: Mapping[Correlation, float]


def read_scores(path: Path) -> list[Rated]:
    """The items of a file; see the module for its schema.

    Raises:
        CmloraError: if it is missing or is not of the schema; the message names item and key.
    """
    try:
        table = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CmloraError(f"cannot read {path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CmloraError(f"{path} is not JSON: {error}") from None
    if not isinstance(table, dict) or table.get(_KEY) != FORMAT:
        raise CmloraError(f"{path}: there is no {_KEY}: {FORMAT}, so these are no such scores")
    items = table.get("items")
    if not isinstance(items, list) or not items:
        raise CmloraError(f"{path}: items is not a list with something in it")
    found = [_item(f"{path}: item {place}", row) for place, row in enumerate(items)]
    if len({item.id for item in found}) < len(found):
        raise CmloraError(f"{path}: two items have the same id")
    return found


def questions(items: Sequence[Rated]) -> list[str]:
    """What people were asked, in the order of first appearance."""
    return list(dict.fromkeys(question for item in items for question in item.human))


def correlate(items: Sequence[Rated]) -> list[Agreement]:
    """Every metric against every question.

    Args:
        items: from `read_scores`.
    """
    metrics = list(dict.fromkeys(metric for item in items for metric in item.metrics))
    found = []
    for question in questions(items):
        for metric in metrics:
            both = [
                (item, mean, item.metrics[metric])
                for item in items
                for mean in [item.mean(question)]
                if mean is not None and metric in item.metrics
            ]
            if len(both) > 2:
                found.append(_agreement(metric, question, both))
    return found


def rater_agreement(items: Sequence[Rated], question: str) -> tuple[float, int]:
    """Krippendorff's alpha (interval scale) of a question, and how many raters answered it."""
    raters = sorted({rater for item in items for rater in item.human.get(question, {})})
    table = [[item.human.get(question, {}).get(rater) for rater in raters] for item in items]
    return krippendorff(table), len(raters)


def tables(items: Sequence[Rated]) -> list[Table]:
    """The result as tables: raters, correlations, means per method."""
    rows = []
    for question in questions(items):
        alpha, raters = rater_agreement(items, question)
        count = sum(1 for item in items if item.human.get(question))
        rows.append([question, str(raters), str(count), _number(alpha)])
    note = "Krippendorff's alpha for interval scales: 1 is agreement, 0 is chance."
    found = [Table("Raters", ["question", "raters", "pictures", "alpha"], rows, note)]
    kinds = get_args(Correlation)
    rows = []
    for one in correlate(items):
        cells = [str(one.coefficients[k]) for k in kinds]
        between = [_number(one.between[k]) for k in kinds]
        rows.append([one.question, one.metric, str(one.items), *cells, *between])
    head = ["question", "metric", "pictures", *kinds, *(f"{k}, methods" for k in kinds)]
    note = (
        "Over pictures, with 95 % bootstrap intervals over sets; and over the means of the methods."
    )
    found.append(Table("Metrics against people", head, rows, note))
    return [*found, _means(items)]


def to_dict(items: Sequence[Rated]) -> dict[str, Any]:
    """The result as JSON types; what cannot be computed is null."""
    return {
        "raters": [
            {"question": q, "alpha": _null(alpha), "raters": raters}
            for q in questions(items)
            for alpha, raters in [rater_agreement(items, q)]
        ],
        "correlations": [
            {
                "question": one.question,
                "metric": one.metric,
                "items": one.items,
                "methods": one.methods,
                **{
                    kind: {
                        "value": _null(cell.value),
                        "low": _null(cell.low),
                        "high": _null(cell.high),
                        "between_methods": _null(one.between[kind]),
                    }
                    for kind, cell in one.coefficients.items()
                },
            }
            for one in correlate(items)
        ],
    }


def _agreement(metric: str, question: str, both: Sequence[tuple[Rated, float, float]]) -> Agreement:
    people, values = [mean for _, mean, _ in both], [value for *_, value in both]
    units = [item.unit for item, *_ in both]
    methods = list(dict.fromkeys(item.method for item, *_ in both))
    by_method = [[row for row in both if row[0].method == method] for method in methods]
    said = [fmean(mean for _, mean, _ in rows) for rows in by_method]
    found = [fmean(value for *_, value in rows) for rows in by_method]
    kinds: tuple[Correlation, ...] = get_args(Correlation)
    return Agreement(
        metric,
        question,
        len(both),
        {kind: correlation_interval(people, values, kind, groups=units) for kind in kinds},
        len(methods),
        {kind: _plain(said, found, kind) for kind in kinds},
    )


def _plain(x: Sequence[float], y: Sequence[float], kind: Correlation) -> float:
    return correlation(x, y, kind) if len(x) > 2 else math.nan


def _means(items: Sequence[Rated]) -> Table:
    """Means of every question and metric per method."""
    asked = questions(items)
    metrics = list(dict.fromkeys(metric for item in items for metric in item.metrics))
    rows = []
    for method in dict.fromkeys(item.method for item in items):
        own = [item for item in items if item.method == method]
        cells = [
            mean_interval([m for item in own if (m := item.mean(question)) is not None])
            for question in asked
        ]
        cells += [mean_interval([i.metrics[k] for i in own if k in i.metrics]) for k in metrics]
        rows.append([f"`{method}`", *(str(c) if c.count else NONE for c in cells)])
    return Table("Means per method", ["method", *asked, *metrics], rows)


def _item(where: str, row: object) -> Rated:
    if not isinstance(row, dict):
        raise CmloraError(f"{where} is not a table")
    for key in row:
        if key not in _KEYS:
            raise CmloraError(f"{where}: unknown key {key!r}; known: {', '.join(_KEYS)}")
    for key in ("id", "method"):
        checks.text(where, key, row.get(key), empty=False)
    unit: Any = row.get("set", row["id"])
    checks.text(where, "set", unit, empty=False)
    human = {}
    for question, given in _table(where, "human", row.get("human")).items():
        inside = f"{where}, human.{question}"
        scores = _table(inside, "the raters' scores", given)
        human[question] = {rater: checks.real(inside, rater, v) for rater, v in scores.items()}
    metrics = {
        name: checks.real(f"{where}, metrics", name, value)
        for name, value in _table(where, "metrics", row.get("metrics")).items()
    }
    return Rated(row["id"], row["method"], unit, human, metrics)


def _table(where: str, name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CmloraError(f"{where}: {name} is {value!r}, not a table")
    return value


def _number(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:.3f}"


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value
