"""Tables of a report as rows of texts, and as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
import re
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

    def latex(self) -> str:
        """As a table for LaTeX with booktabs; intervals are small, the best is bold."""
        head = " & ".join(map(_latex, self.head))
        rows = [" & ".join(map(_latex, row)) + r" \\" for row in self.rows]
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(self.title[:1].upper() + self.title[1:])}. {_latex(self.note)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(self.head) - 1)}}}",
            r"\toprule",
            rf"{head} \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
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
    side = {"more": "More is better", "less": "Less is better", "neither": "No side is better"}
    note = (
        f"{side[metric.better]}; 95 % bootstrap intervals over sets ({sets} sets), none where "
        "all sets are equal."
        + ("" if metric.better == "neither" else f" {BETTER} better and {WORSE} worse than ")
        + ("" if metric.better == "neither" else f"`{baseline}`, sign-flip test, p < 0.05 by Holm.")
    )
    return Table(metric.title, head, rows, note)


def overview_table(
    summary: Summary, metrics: Sequence[Metric], baseline: str, *, timed: bool = True
) -> Table:
    """A row per method with the means of the main numbers, and what it costs.

    Args:
        summary: the numbers.
        metrics: the columns, without costs.
        baseline: what is compared with, in quality and in multiply-accumulates.
        timed: whether seconds are a column.
    """
    rows = []
    shown = {m.name: {k: summary.cell(m.name, k, None) for k in summary.labels} for m in metrics}
    best = {m.name: _best(m, shown[m.name]) for m in metrics}
    price = summary.cell("gmacs", baseline, None).value
    for label in summary.labels:
        row = [f"`{label}`"]
        for m in metrics:
            text = interval_text(shown[m.name][label], m.digits)
            marked = f"**{text}**" if label in best[m.name] else text
            row.append(marked + _sign(summary.differences(m.name, baseline, None).get(label)))
        macs = summary.cell("gmacs", label, None).value
        row += [NONE, NONE] if math.isnan(macs) else [f"{macs:.1f}", f"{macs / price:.2f}"]
        rows.append([*row, f"{summary.cell('seconds', label, None).value:.2f}"] if timed else row)
    sizes = ", ".join(map(str, summary.sizes))
    sides = [f"{m.title}: {m.better}" for m in metrics]
    return Table(
        "Overview",
        [
            "method",
            *(m.title for m in metrics),
            "GMACs",
            f"of `{baseline}`",
            *(["seconds"] * timed),
        ],
        rows,
        f"Means over N = {sizes}, every N counting the same, with 95 % bootstrap intervals over "
        f"sets; better is {', '.join(sides)}. {BETTER} better and {WORSE} worse than `{baseline}`, "
        "sign-flip test, p < 0.05 by Holm. Costs are per picture.",
    )


def difference_table(summary: Summary, metric: Metric, baseline: str) -> Table | None:
    """Every method less the baseline, pair by pair, with intervals and p values."""
    columns: list[int | None] = [*summary.sizes]
    if len(summary.sizes) > 1:
        columns.append(None)
    found = {n: summary.differences(metric.name, baseline, n) for n in columns}
    rows = []
    for label in summary.labels:
        cells = [_difference(found[n].get(label), metric.digits) for n in columns]
        if any(cell != NONE for cell in cells):
            rows.append([f"`{label}`", *cells])
    return (
        None
        if not rows
        else Table(
            f"{metric.title}, difference to `{baseline}`",
            ["method", *(f"N = {n}" if n is not None else "mean" for n in columns)],
            rows,
            "Means of the differences on the same set and seed, with 95 % bootstrap intervals over "
            "sets; p of the sign-flip test, by Holm within a column.",
        )
    )


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
    numbered = len(labels) > 8 or max(map(len, labels)) > 20
    names = [f"{i} `{k}`" if numbered else f"`{k}`" for i, k in enumerate(labels, 1)]
    head = [str(i) for i in range(1, len(labels) + 1)] if numbered else names
    rows = []
    for name, one in zip(names, labels, strict=True):
        row = [name]
        for other in labels:
            counts = wins.get((one, other))
            row.append(NONE if counts is None else "-".join(map(str, percent(counts))))
        rows.append(row)
    said = "Win-tie-lose of the row against the column, in percent of the pairs."
    return Table(title, ["", *head], rows, f"{said} {note}".strip())


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
    """An estimate with its bounds, if there are any: not where all sets are equal.

    >>> interval_text(Interval(0.5, 0.41, 0.6, 9), 2)
    '0.50 [0.41, 0.60]'
    """
    if cell.count == 0:
        return NONE
    if math.isnan(cell.low) or cell.low == cell.high:
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


def _difference(found: Difference | None, digits: int) -> str:
    if found is None:
        return NONE
    low, high = found.interval.low, found.interval.high
    bounds = "" if math.isnan(low) or low == high else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    p = "p < 0.001" if found.p < 0.001 else f"p = {found.p:.3f}"
    return f"{found.value:+.{digits}f}{bounds}, {p}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.10g}"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def _latex(cell: str) -> str:
    """A cell with Markdown's marks as LaTeX."""
    text = re.sub(r"([&%$#_{}])", r"\\\1", cell)
    text = re.sub(r"`([^`]+)`", r"\\texttt{\1}", text)
    text = re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text)
    text = re.sub(r"(?<=\d) (\[[^\]]+\])", r" {\\scriptsize \1}", text)
    text = re.sub(r"(?<![\w-])-(?=\d)", "$-$", text).replace(" < ", " $<$ ")
    signs = {BETTER: r"$\blacktriangle$", WORSE: r"$\blacktriangledown$"}
    for sign, command in signs.items():
        text = text.replace(sign, command)
    return text
