"""The plots of a report, from its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cmlora.eval.metrics import Metric, metric_of
from cmlora.eval.report.charts import Point, Series, forest, scatter
from cmlora.eval.report.summary import Summary


def quality_against_cost(summary: Summary, metric: Metric, cost: str) -> str:
    """Quality over cost: one mark per method, at its means over N, and pale ones for every N.

    A broken line joins the methods that no other beats at the same price or less.

    Args:
        summary: the numbers.
        metric: the quality.
        cost: ``gmacs`` or ``seconds``.
    """
    if cost not in summary.values or metric.name not in summary.values:
        return ""
    several = len(summary.sizes) > 1

    def point(label: str, n: int | None) -> Point:
        price, cell = summary.cell(cost, label, n), summary.cell(metric.name, label, n)
        return Point(price.value, cell.value, cell.low, cell.high)

    series = [
        Series(
            label,
            [point(label, None if several else summary.sizes[0])],
            behind=[point(label, n) for n in summary.sizes] if several else (),
        )
        for label in summary.labels
    ]
    corner = {"more": "upper left is better", "less": "lower left is better"}
    said = ", means over N" if several else ""
    return scatter(
        f"{metric.title} against {metric_of(cost).title}{said}",
        series,
        metric_of(cost).title,
        metric.title,
        log_x=True,
        best=corner.get(metric.better, ""),
        front=front([one.points[0] for one in series], metric),
    )


def front(points: Sequence[Point], metric: Metric) -> list[Point]:
    """The points that no other one beats at the same price or less, from the cheapest on.

    Args:
        points: price and quality.
        metric: the quality; nothing is better than anything if it has no good side.
    """
    sign = {"more": 1, "less": -1, "neither": 0}[metric.better]
    known = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    found: list[Point] = []
    for p in sorted(known, key=lambda p: (p.x, -sign * p.y)):
        if sign and (not found or sign * p.y > sign * found[-1].y):
            found.append(p)
    return found


def quality_by_size(summary: Summary, metric: Metric) -> str:
    """Quality over N, one line per method."""
    if len(summary.sizes) < 2:
        return ""
    series = []
    for label in summary.labels:
        cells = [(n, summary.cell(metric.name, label, n)) for n in summary.sizes]
        points = [Point(n, c.value, c.low, c.high) for n, c in cells if c.count]
        series.append(Series(label, points))
    return scatter(f"{metric.title} by number of LoRAs", series, "N", metric.title)


def strengths(title: str, rows: Sequence[tuple[str, Point]]) -> str:
    """Bradley-Terry strengths with their intervals."""
    return forest(title, rows, "log strength")


def frequency_curves(loras: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """High-frequency share and size of each LoRA's contribution over a run.

    Args:
        loras: the LoRAs of a run's settings; those without a profile are left out.
    """
    found = []
    for curve, title in (("ratio", "high-frequency share"), ("norm", "size of the contribution")):
        series = [
            Series(
                lora["id"],
                [Point(x, y) for x, y in zip(lora["fractions"], lora[curve], strict=True)],
            )
            for lora in loras
            if curve in lora
        ]
        found.append(scatter(f"{title} over the run", series, "part of the run", title))
    return found[0], found[1]
