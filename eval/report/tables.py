"""Tables of a report as rows of texts, and as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cmlora.eval.metrics import PER_CONCEPT, Metric
from cmlora.eval.report.summary import Difference, Summary
from cmlora.eval.statistics import Interval

NONE = "-"
BETTER, WORSE = "▲", "▼"


@dataclass(frozen=True)
class Table:
    """Rows of texts under a head.

    Args:
        title: what it is of.
        head: names of the columns; the first one holds names, the others numbers.
        rows: the cells.
        note: what a reader has to know.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """As a GitHub table with its title and note."""
        lines = [f"**{self.title}**", ""]
        lines.append("| " + " | ".join(map(_escaped, self.head)) + " |")
        lines.append("|---|" + "---:|" * (len(self.head) - 1))
        lines += ["| " + " | ".join(map(_escaped, row)) + " |" for row in self.rows]
        if self.note:
            lines += ["", self.note]
        return "\n".join(lines)


def metric_table(summary: Summary, metric: Metric, baseline: str) -> Table:
    """A row per method, a column per N and one for the mean, with intervals and significance."""
    columns: list[int | None] = [*summary.sizes]
    if len(summary.sizes) > 1:
        columns.append(None)
    differences = {n: summary.differences(metric.name, baseline, n) for n in columns}
    cells = {
        (label, n): summary.cell(metric.name, label, n) for label in summary.labels for n in columns
    }
    best = {n: _best(metric, {label: cells[label, n] for label in summary.labels}) for n in columns}
    rows = []
    for label in summary.labels:
        row = [f"`{label}`"]
        for n in columns:
            text = interval_text(cells[label, n], metric.digits)
            shown = f"**{text}**" if label in best[n] else text
            row.append(shown + _sign(differences[n].get(label)))
        rows.append(row)
    head = ["method", *(f"N = {n}" if n is not None else "mean" for n in columns)]
    counts = [max(cells[label, n].count for label in summary.labels) for n in columns]
    sets = ", ".join(str(c) for n, c in zip(columns, counts, strict=True) if n is not None)
    side = {"more": "more is better", "less": "less is better", "neither": "no side is better"}
    note = (
        f"{side[metric.better]}; 95 % bootstrap intervals over sets ({sets} sets)."
        + ("" if metric.better == "neither" else f" {BETTER} better and {WORSE} worse than ")
        + ("" if metric.better == "neither" else f"`{baseline}`, sign-flip test, p < 0.05 by Holm.")
    )
    return Table(metric.title, head, rows, note)


def survival_table(summary: Summary, mark: str) -> Table | None:
    """How concepts of each category come through, per method; nothing if it was not scored."""
    if mark not in summary.concepts:
        return None
    categories = list(dict.fromkeys(summary.categories.values()))
    rows = []
    for label in summary.labels:
        cells = [summary.survival(mark, label, category) for category in categories]
        digits = 2 if mark == "clip" else 3
        rows.append([f"`{label}`", *(interval_text(cell, digits) for cell in cells)])
    title = f"{PER_CONCEPT.get(mark, mark)}, by category"
    return Table(title, ["method", *categories], rows, "95 % bootstrap intervals over sets.")


def wins_table(
    title: str,
    labels: Sequence[str],
    wins: Mapping[tuple[str, str], tuple[int, int, int]],
    note: str = "",
) -> Table | None:
    """Win, tie and lose of every method against every other, in percent of the pairs."""
    if not wins:
        return None
    rows = []
    for one in labels:
        row = [f"`{one}`"]
        for other in labels:
            counts = wins.get((one, other))
            row.append(NONE if counts is None else "-".join(map(str, percent(counts))))
        rows.append(row)
    said = "win-tie-lose of the row against the column, in percent of the pairs."
    return Table(title, ["", *(f"`{label}`" for label in labels)], rows, f"{said} {note}".strip())


def percent(counts: Sequence[int]) -> list[int]:
    """Whole percentages that add up to 100, by largest remainders.

    >>> percent((1, 1, 1))
    [34, 33, 33]
    """
    total = sum(counts)
    exact = [100 * count / total for count in counts]
    found = [math.floor(value) for value in exact]
    short = sorted(range(len(counts)), key=lambda i: (found[i] - exact[i], i))
    for place in short[: 100 - sum(found)]:
        found[place] += 1
    return found


def long_csv(summary: Summary, baseline: str) -> str:
    """Every number of every metric, method and N as CSV, with bounds, counts and tests.

    Args:
        summary: the numbers.
        baseline: what differences and p values are against.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["metric", "method", "n", "value", "low", "high", "sets"]
    writer.writerow([*head, "baseline", "difference", "p_sign_flip_holm", "p_wilcoxon"])
    for metric in summary.metrics:
        for n in (*summary.sizes, None):
            differences = summary.differences(metric.name, baseline, n)
            for label in summary.labels:
                cell = summary.cell(metric.name, label, n)
                if cell.count:
                    numbers = [_number(v) for v in (cell.value, cell.low, cell.high)]
                    row = [metric.name, label, "mean" if n is None else n, *numbers, cell.count]
                    d = differences.get(label)
                    tests = [] if d is None else [d.value, d.p, d.wilcoxon]
                    writer.writerow([*row, baseline if tests else "", *map(_number, tests)])
    return text.getvalue()


def interval_text(cell: Interval, digits: int) -> str:
    """An estimate with its bounds.

    >>> interval_text(Interval(0.5, 0.41, 0.6, 9), 2)
    '0.50 [0.41, 0.60]'
    """
    if cell.count == 0:
        return NONE
    if math.isnan(cell.low):
        return f"{cell.value:.{digits}f}"
    return f"{cell.value:.{digits}f} [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"


def _best(metric: Metric, cells: Mapping[str, Interval]) -> set[str]:
    """The labels with the best value, as shown."""
    shown = {k: round(c.value, metric.digits) for k, c in cells.items() if c.count}
    if metric.better == "neither" or not shown:
        return set()
    top = max(shown.values()) if metric.better == "more" else min(shown.values())
    return {label for label, value in shown.items() if value == top}


def _sign(difference: Difference | None) -> str:
    if difference is None or difference.better is None:
        return ""
    return f" {BETTER if difference.better else WORSE}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.10g}"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
