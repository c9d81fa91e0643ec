"""Plots as SVG text: small, sharp at every size, and part of the page itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
    "#8c564b",
    "#bcbd22",
    "#17becf",
)
"""Colours that people with colour blindness can tell apart, then some more."""

MARKS = ("circle", "square", "triangle", "diamond")
HEIGHT = 400
LEFT, END, TOP, BOTTOM = 66, 460, 34, 52
"""Where plots begin and end; the legend is to the right of them, as wide as its words."""

LETTER = 6.8
"""About the width of a letter of 12 pixels, on the safe side."""

INK, PALE, GRID = "#222", "#666", "#e4e4e4"


@dataclass(frozen=True)
class Point:
    """A mark of a scatter plot.

    Args:
        x: to the right.
        y: upwards.
        low: lower end of its interval, or NaN.
        high: upper end.
    """

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Series:
    """Points of one colour.

    Args:
        name: in the legend.
        points: from left to right.
        joined: whether a line runs through them.
        behind: further points, small and pale, joined by a thin line.
    """

    name: str
    points: Sequence[Point]
    joined: bool = True
    behind: Sequence[Point] = ()


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        a, b, v = (self.low, self.high, value)
        if self.log:
            a, b, v = math.log(a), math.log(b), math.log(v)
        return self.start + (v - a) / (b - a) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            return _log_ticks(self.low, self.high)
        step = _nice((self.high - self.low) / 6)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(step * k, 12) for k in range(first, last + 1)]


def scatter(
    title: str,
    series: Sequence[Series],
    x: str,
    y: str,
    *,
    log_x: bool = False,
    best: str = "",
    front: Sequence[Point] = (),
) -> str:
    """A plot of marks with error bars, and lines through the marks of a series.

    Args:
        title: above.
        series: one colour each; the legend names them.
        x: name of the horizontal axis.
        y: name of the vertical axis.
        log_x: whether the horizontal axis is logarithmic.
        best: a word on where the good corner is.
        front: corners of a broken line behind everything, from left to right.
    """
    points = [p for s in series for p in (*s.points, *s.behind) if _drawable(p)]
    if not any(_drawable(p) for s in series for p in s.points):
        return ""
    logarithmic = log_x and min(p.x for p in points) > 0
    across = _axis([p.x for p in points], LEFT, END, log=logarithmic)
    heights = [v for p in points for v in (p.y, p.low, p.high) if math.isfinite(v)]
    up = _axis(heights, HEIGHT - BOTTOM, TOP)
    parts = [_frame(title, x, y, across, up)]
    if len(front) > 1:
        parts.append(_path(front, across, up, PALE, 1, 'stroke-dasharray="4 4"'))
    for place, one in enumerate(series):
        colour, mark = PALETTE[place % len(PALETTE)], MARKS[place // len(PALETTE) % len(MARKS)]
        inside = [p for p in one.points if _drawable(p)]
        behind = [p for p in one.behind if _drawable(p)]
        if len(behind) > 1:
            parts.append(_path(behind, across, up, colour, 1, 'opacity="0.4"'))
            parts += [_dot(across(p.x), up(p.y), colour) for p in behind]
        if one.joined and len(inside) > 1:
            parts.append(_path(inside, across, up, colour, 1.5))
        for p in inside:
            if math.isfinite(p.low) and math.isfinite(p.high):
                parts.append(_line(across(p.x), up(p.low), across(p.x), up(p.high), colour, 1.2))
            parts.append(_mark(mark, across(p.x), up(p.y), colour))
        at = TOP + 10 + 18 * place
        parts.append(_mark(mark, END + 18, at, colour))
        parts.append(_text(END + 28, at + 4, one.name, INK, 12))
    below = TOP + 18 + 18 * len(series)
    notes = [note for note in (best, "broken: best at its price" if len(front) > 1 else "") if note]
    for place, note in enumerate(notes):
        parts.append(_text(END + 14, below + 8 + 15 * place, note, PALE, 11))
    words = [*(one.name for one in series), *notes]
    width = END + 40 + LETTER * max(map(len, words), default=0)
    return _svg(parts, title, width, max(HEIGHT, below + 15 * len(notes) + 8))


def forest(title: str, rows: Sequence[tuple[str, Point]], x: str, *, zero: bool = True) -> str:
    """A row per method with its value and interval, for example the difference to a baseline.

    Args:
        title: above.
        rows: name, and a point whose ``x`` is the value between ``low`` and ``high``.
        x: name of the axis.
        zero: whether a line marks zero.
    """
    kept = [(name, p) for name, p in rows if math.isfinite(p.x)]
    if not kept:
        return ""
    spread = [v for _, p in kept for v in (p.x, p.low, p.high) if math.isfinite(v)]
    height = TOP + 24 * len(kept) + BOTTOM
    left = 24 + LETTER * max(len(name) for name, _ in kept)
    right = left + END - LEFT
    across = _axis([*spread, 0.0] if zero else spread, left, right)
    parts = [_text((left + right) / 2, 18, title, INK, 14, anchor="middle")]
    bottom = height - BOTTOM + 6
    for tick in across.ticks():
        parts.append(_line(across(tick), TOP, across(tick), bottom, GRID))
        parts.append(_text(across(tick), bottom + 16, _plain(tick), PALE, 11, anchor="middle"))
    if zero:
        parts.append(_line(across(0), TOP, across(0), bottom, PALE))
    for place, (name, p) in enumerate(kept):
        y = TOP + 14 + 24 * place
        if math.isfinite(p.low) and math.isfinite(p.high):
            parts.append(_line(across(p.low), y, across(p.high), y, PALETTE[0], 1.5))
        parts.append(_mark("circle", across(p.x), y, PALETTE[0]))
        parts.append(_text(left - 12, y + 4, name, INK, 12, anchor="end"))
    parts.append(_text((left + right) / 2, height - 14, x, PALE, 12, anchor="middle"))
    return _svg(parts, title, right + 20, height)


def _drawable(point: Point) -> bool:
    return math.isfinite(point.x) and math.isfinite(point.y)


def _frame(title: str, x: str, y: str, across: _Axis, up: _Axis) -> str:
    parts = [_text((LEFT + END) / 2, 18, title, INK, 14, anchor="middle")]
    for tick in up.ticks():
        parts.append(_line(LEFT, up(tick), END, up(tick), GRID))
        parts.append(_text(LEFT - 6, up(tick) + 4, _plain(tick), PALE, 11, anchor="end"))
    for tick in across.ticks():
        parts.append(_line(across(tick), TOP, across(tick), HEIGHT - BOTTOM, GRID))
        at = HEIGHT - BOTTOM + 16
        parts.append(_text(across(tick), at, _plain(tick), PALE, 11, anchor="middle"))
    parts.append(_line(LEFT, TOP, LEFT, HEIGHT - BOTTOM, PALE))
    parts.append(_line(LEFT, HEIGHT - BOTTOM, END, HEIGHT - BOTTOM, PALE))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(_text((LEFT + END) / 2, HEIGHT - 14, x, PALE, 12, anchor="middle"))
    parts.append(
        f'<text x="16" y="{middle:.0f}" fill="{PALE}" font-size="12" text-anchor="middle" '
        f'transform="rotate(-90 16 {middle:.0f})">{escape(y)}</text>'
    )
    return "".join(parts)


def _axis(values: Sequence[float], start: float, end: float, *, log: bool = False) -> _Axis:
    low, high = min(values), max(values)
    if log:
        factor = max((high / low) ** 0.06, 1.05)
        return _Axis(low / factor, high * factor, start, end, log=True)
    if low == high:
        low, high = low - max(abs(low), 1.0) * 0.1, high + max(abs(high), 1.0) * 0.1
    pad = 0.06 * (high - low)
    return _Axis(low - pad, high + pad, start, end)


def _nice(rough: float) -> float:
    """The next of 1, 2, 5, 10, ... above."""
    power = 10 ** math.floor(math.log10(rough))
    return next(float(k * power) for k in (1, 2, 5, 10) if k * power >= rough * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    found = [k * 10.0**p for p in powers for k in (1, 2, 5) if low <= k * 10.0**p <= high]
    return found or [low, high]


def _plain(value: float) -> str:
    return f"{value:.6g}"


def _mark(kind: str, x: float, y: float, colour: str) -> str:
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    corners = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "triangle": ((0, -5.5), (5, 4), (-5, 4)),
        "diamond": ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
    }[kind]
    path = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)
    return f'<polygon points="{path}" fill="{colour}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"/>'
    )


def _path(
    points: Sequence[Point], across: _Axis, up: _Axis, colour: str, width: float, more: str = ""
) -> str:
    path = " ".join(f"{across(p.x):.1f},{up(p.y):.1f}" for p in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" {more}/>'
    )


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}" opacity="0.4"/>'


def _text(x: float, y: float, text: str, colour: str, size: int, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(parts: Sequence[str], title: str, width: float, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-family="sans-serif" role="img" '
        f'aria-label="{escape(title, quote=True)}">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>'
    )
