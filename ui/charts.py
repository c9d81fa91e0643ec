"""Charts as SVG: they follow the page's theme, scale, and need no library."""

from collections.abc import Mapping, Sequence
from html import escape

from cmlora.ui.understanding import FULL, Timeline

COLOURS = ("#d9480f", "#1971c2", "#2f9e44", "#9c36b5", "#e8a500", "#0c8599", "#c2255c", "#748094")
"""Told apart by most eyes and readable on light and dark."""

_WIDTH, _LEFT, _RIGHT = 720, 54, 10


def colour(index: int) -> str:
    """The colour of the LoRA with this place in the selection."""
    return COLOURS[index % len(COLOURS)]


def rgb(index: int) -> tuple[int, int, int]:
    """The same as numbers.

    >>> rgb(0)
    (217, 72, 15)
    """
    text = colour(index)[1:]
    return int(text[:2], 16), int(text[2:4], 16), int(text[4:], 16)


def lines(
    series: Mapping[str, Sequence[float]],
    title: str,
    *,
    xs: Sequence[float] | None = None,
    height: int = 180,
    colours: Mapping[str, int] | None = None,
    top: float | None = None,
    ends: tuple[str, str] = ("start of the run", "end"),
) -> str:
    """Curves over the run, from its beginning at the left to its end.

    Args:
        series: values by name.
        title: said to those who do not see the chart.
        xs: where in the run the values are, 0 to 1; evenly spread if not given.
        height: in the units of the drawing, which is 720 wide.
        colours: index of each name's colour; in order if not given.
        top: upper end of the axis; the largest value if not given.
        ends: what is at the left and at the right.
    """
    most = top or max((v for values in series.values() for v in values), default=0.0) or 1.0
    bottom, upper = height - 24, 10
    wide = _WIDTH - _LEFT - _RIGHT

    def x(place: float) -> float:
        return _LEFT + wide * place

    def y(value: float) -> float:
        return bottom - (bottom - upper) * min(max(value / most, 0.0), 1.0)

    parts = []
    for part in (0.0, 0.5, 1.0):
        parts.append(
            f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(part * most):.1f}" '
            f'y2="{y(part * most):.1f}"/><text x="{_LEFT - 6}" y="{y(part * most) + 4:.1f}" '
            f'text-anchor="end">{part * most:.2g}</text>'
        )
    for index, (name, values) in enumerate(series.items()):
        count = len(values)
        spread = xs or [i / max(count - 1, 1) for i in range(count)]
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(spread, values, strict=True))
        shade = colour(index if colours is None else colours[name])
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{shade}" stroke-width="2.5" '
            f'stroke-linejoin="round"><title>{escape(name)}</title></polyline>'
        )
    first, last = map(escape, ends)
    parts.append(f'<text x="{_LEFT}" y="{height - 6}">{first}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{height - 6}" text-anchor="end">{last}</text>')
    return _svg("".join(parts), height, title)


def timeline(found: Timeline) -> str:
    """A run as a table of cells: full passes are solid, light ones thin, shares are the depth."""
    order = {name: index for index, name in enumerate(found.names)}
    left, row, gap = 132, 26, 6
    wide = (_WIDTH - left - _RIGHT) / max(found.steps, 1)
    space = 1.0 if wide > 5 else 0.0
    parts = []
    for line, (key, moments) in enumerate(found.passes.items()):
        upper = line * (row + gap) + 4
        shade = COLOURS[-1] if key not in order else colour(order[key])
        label = key if len(key) <= 18 else f"{key[:16]}.."
        parts.append(
            f'<text class="strong" x="0" y="{upper + 17}">{escape(label)}'
            f"<title>{escape(key)}</title></text>"
        )
        for step, moment in enumerate(moments):
            if moment is None:
                continue
            light = moment.kind != FULL
            tall, depth = (7 if light else row), 0.85
            if moment.share is not None and not light:
                depth = 0.25 + 0.75 * min(moment.share, 1.0)
            parts.append(
                f'<rect x="{left + step * wide:.1f}" y="{upper + (row - tall) / 2:.1f}" '
                f'width="{max(wide - space, 0.5):.1f}" height="{tall}" fill="{shade}" '
                f'fill-opacity="{depth:.2f}"><title>{_tip(key, step, moment.kind, moment.share)}'
                "</title></rect>"
            )
            if found.dominant[step] == key and wide > 4 and len(found.passes) > 1:
                parts.append(
                    f'<circle cx="{left + (step + 0.5) * wide - space / 2:.1f}" '
                    f'cy="{upper + row / 2:.1f}" r="{min(3.2, wide / 3):.1f}" fill="#fff"/>'
                )
    height = len(found.passes) * (row + gap) + 24
    parts.append(f'<text x="{left}" y="{height - 4}">step 1</text>')
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{height - 4}" text-anchor="end">{found.steps}</text>'
    )
    return _svg("".join(parts), height, "Schedule of the passes over the steps")


def legend(names: Sequence[str], colours: Mapping[str, int] | None = None) -> str:
    """Names with their colours."""
    rows = [
        f'<li><i style="background:{colour(i if colours is None else colours[name])}"></i>'
        f"{escape(name)}</li>"
        for i, name in enumerate(names)
    ]
    return f'<ul class="legend">{"".join(rows)}</ul>'


def intervals(rows: Sequence[tuple[str, float, float, float]], title: str) -> str:
    """Points with their intervals, one line each, on a common axis.

    Args:
        rows: name, value, lower and upper end.
        title: said to those who do not see the chart.
    """
    low = min((row[2] for row in rows), default=0.0)
    high = max((row[3] for row in rows), default=1.0)
    span = (high - low) or 1.0
    left, line = 190, 30
    wide = _WIDTH - left - 70

    def x(value: float) -> float:
        return left + wide * (value - low) / span

    parts = []
    for index, (name, value, start, end) in enumerate(rows):
        middle = index * line + 18
        label = name if len(name) <= 26 else f"{name[:24]}.."
        parts.append(
            f'<text class="strong" x="0" y="{middle + 4}">{escape(label)}</text>'
            f'<line x1="{x(start):.1f}" x2="{x(end):.1f}" y1="{middle}" y2="{middle}" '
            f'stroke="{COLOURS[1]}" stroke-width="3" stroke-opacity=".45"/>'
            f'<circle cx="{x(value):.1f}" cy="{middle}" r="5" fill="{COLOURS[1]}"/>'
            f'<text x="{_WIDTH}" y="{middle + 4}" text-anchor="end">{value:.0f}</text>'
        )
    return _svg("".join(parts), len(rows) * line + 8, title)


def _tip(key: str, step: int, kind: str, share: float | None) -> str:
    part = "" if share is None else f", share {share:.0%}"
    return escape(f"step {step + 1}: {key}, {kind}{part}")


def _svg(body: str, height: float, title: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title, quote=True)}">{body}</svg>'
    )
