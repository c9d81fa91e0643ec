"""Published tables beside a run's own numbers for the same cells."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from cmlora.errors import CmloraError
from cmlora.eval.judge.tally import Verdicts, judged
from cmlora.eval.report.summary import Summary, summarise
from cmlora.eval.report.tables import NONE, Table, interval_text, percent
from cmlora.eval.statistics import Interval, mean_interval
from cmlora.eval.study import Study
from cmlora.eval.variants import read

MEASURED = "measured"


def published() -> list[dict[str, Any]]:
    """The published tables, with where they are from."""
    text = resources.files("cmlora.eval").joinpath("data", "published.json").read_text("utf-8")
    tables: list[dict[str, Any]] = json.loads(text)["tables"]
    return tables


def beside(study: Study | None = None, *, only: Sequence[str] = ()) -> list[Table]:
    """Every published table, followed row by row by what the run measured.

    Args:
        study: a run; without one, the published numbers alone.
        only: ids of tables; all if empty.

    Raises:
        CmloraError: for an unknown id, or a run without pictures.
    """
    tables = published()
    known = [table["id"] for table in tables]
    for name in only:
        if name not in known:
            raise CmloraError(f"no published table {name!r}; there are {', '.join(known)}")
    run = None if study is None else _Run(study)
    return [_table(table, run) for table in tables if not only or table["id"] in only]


class _Run:
    """A run's own numbers, by the cells of published tables."""

    def __init__(self, study: Study) -> None:
        self.summary: Summary = summarise(study)
        self.testbed = study.manifest.name
        self.judges: list[Verdicts] = judged(study)
        self.failed = len(study.failures())

    def labels(self, method: str) -> list[str]:
        """Labels of a method, with and without options and caches."""
        return [label for label in self.summary.labels if _method(label) == method]

    def cell(self, table: Mapping[str, Any], row: Mapping[str, Any], place: int, label: str) -> str:
        """What the run has for a cell; a dash if it has nothing."""
        column, metric = table["columns"][place], table["metric"]
        if isinstance(metric, list):
            return self._score(metric[place], label, None) if metric[place] else NONE
        if metric == "clip_score":
            return self._score(metric, label, None if column == "mean" else int(column))
        verdicts = self._verdicts(table)
        if verdicts is None:
            return NONE
        if metric == "wins":
            return self._wins(verdicts, label, row["dimension"], int(column))
        if "dimension" in table:
            return interval_text(_marks(verdicts, label, table["dimension"], int(column)), 2)
        return interval_text(_marks(verdicts, label, column, None), 2)

    def _score(self, metric: str, label: str, n: int | None) -> str:
        if n is None and len(self.summary.sizes) < 4:
            return NONE  # the published means are over N = 2 to 5
        return interval_text(self.summary.cell(metric, label, n), 2)

    def _verdicts(self, table: Mapping[str, Any]) -> Verdicts | None:
        asked = [v for v in self.judges if v.protocol == table.get("protocol") and v.duels]
        return max(asked, key=lambda v: len(v.duels)) if asked else None

    def _wins(self, verdicts: Verdicts, label: str, dimension: str, n: int) -> str:
        duels = [duel for duel in verdicts.duels if duel.n == n]
        counts = verdicts.wins(dimension, duels).get((label, "merge"))
        return NONE if counts is None else "-".join(map(str, percent(counts)))


def _method(label: str) -> str:
    """The method of a label; nothing for one that only another version knows."""
    try:
        return read([label])[0].method
    except CmloraError:
        return ""


def _marks(verdicts: Verdicts, label: str, dimension: str, n: int | None) -> Interval:
    by_set: dict[str, list[float]] = {}
    for duel in verdicts.duels:
        for name, mark in zip((duel.one, duel.other), duel.marks(dimension), strict=True):
            if name == label and n in (None, duel.n):
                by_set.setdefault(duel.unit, []).append(mark)
    return mean_interval([sum(v) / len(v) for _, v in sorted(by_set.items())])


def _table(table: Mapping[str, Any], run: _Run | None) -> Table:
    rows = []
    for row in table["rows"]:
        rows.append([row["name"], "published", *map(_text, row["values"])])
        if run is None or not row["method"]:
            continue
        for label in run.labels(row["method"]):
            cells = [run.cell(table, row, place, label) for place in range(len(table["columns"]))]
            if any(cell != NONE for cell in cells):
                rows.append([f"`{label}`", f"{MEASURED}, {run.testbed}", *cells])
    head = ["", "from", *(f"N = {c}" if c.isdigit() else c for c in table["columns"])]
    return Table(table["title"], head, rows, _note(table, run, rows))


def _note(table: Mapping[str, Any], run: _Run | None, rows: Sequence[Sequence[str]]) -> str:
    parts = [f"Published: {table['source']}. {table['remark']}".strip()]
    if run is None:
        return parts[0]
    if not any(MEASURED in row[1] for row in rows):
        parts.append("This run has measured none of these cells.")
    elif run.testbed not in table["testbeds"]:
        parts.append(
            f"The run is on `{run.testbed}`, another testbed with another model: its numbers stand "
            "beside the published ones and cannot be compared with them."
        )
    else:
        other = [name for name in table["testbeds"] if name != run.testbed]
        parts.append(f"The run is on `{run.testbed}` alone; published are means with {other[0]}.")
    if run.failed:
        parts.append(f"{run.failed} jobs of the run failed and are missing.")
    return " ".join(parts)


def _text(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
