"""A number that changes in the course of a run."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal, get_args

from cmlora.errors import CmloraError
from cmlora.plan import Step

Ease = Literal["linear", "hold", "smooth", "in", "out"]
Over = Literal["fraction", "step", "sigma"]


@dataclass(frozen=True)
class Curve:
    """Values at some points of a run, and how one gets from each to the next.

    The place of a step is that of its beginning: with T steps, step i is at fraction i / T, so
    a window that ends at 0.5 holds the first half of the steps exactly. Before the first point
    and after the last one the curve is constant; at a place that has two points it jumps.

    Args:
        points: (place, value) pairs, ascending by place.
        ease: between two points: ``linear``; ``hold`` keeps the first one's value; ``smooth`` is
            slow at both ends (3 t^2 - 2 t^3), ``in`` at the first (t^2), ``out`` at the second.
        over: what places are: a ``fraction`` of the run, a ``step`` counted from 0, or a noise
            level ``sigma`` as the scheduler counts it, which falls in the course of a run. With
            ``hold`` the value of the nearest point at or below the noise level counts.

    Raises:
        CmloraError: if there is no point, or one is impossible, or they do not ascend.
    """

    points: tuple[tuple[float, float], ...]
    ease: Ease = "linear"
    over: Over = "fraction"

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple((float(x), float(y)) for x, y in self.points))
        if self.ease not in get_args(Ease):
            raise CmloraError(f"schedule: ease is {self.ease!r}, not {_listed(get_args(Ease))}")
        if self.over not in get_args(Over):
            raise CmloraError(f"schedule: over is {self.over!r}, not {_listed(get_args(Over))}")
        if not self.points:
            raise CmloraError("schedule: a curve needs at least one point")
        places = [place for place, _ in self.points]
        if not all(math.isfinite(number) for point in self.points for number in point):
            raise CmloraError(f"schedule: {self.points} has numbers that are not finite")
        if min(places) < 0 or (self.over == "fraction" and max(places) > 1):
            high = "1" if self.over == "fraction" else "any number above"
            raise CmloraError(f"schedule: places {places} over {self.over}; they are 0 to {high}")
        if sorted(places) != places:
            raise CmloraError(f"schedule: places {places} are not in ascending order")

    @property
    def constant(self) -> bool:
        """Whether it has one value everywhere."""
        return len({value for _, value in self.points}) == 1

    def value(self, place: float) -> float:
        """The curve at a place.

        >>> Curve(((0.0, 0.0), (0.5, 1.0))).value(0.25)
        0.5
        """
        after = bisect_right(self.points, place, key=lambda point: point[0])
        if after == 0:
            return self.points[0][1]
        if after == len(self.points):
            return self.points[-1][1]
        (x0, y0), (x1, y1) = self.points[after - 1], self.points[after]
        return y0 + (y1 - y0) * _eased((place - x0) / (x1 - x0), self.ease)

    def at(self, step: Step) -> float:
        """The curve at a step that is about to run.

        Raises:
            CmloraError: over ``sigma`` where the noise level is not known.
        """
        if self.constant:
            return self.points[0][1]
        if self.over == "fraction":
            return self.value(step.fraction)
        if self.over == "step":
            return self.value(step.index)
        if step.sigma is None:
            raise CmloraError(
                "schedule over sigma: the noise levels of this run are not known; "
                "use fractions of the run instead"
            )
        return self.value(step.sigma)


def constant(value: float) -> Curve:
    """The same value at every step."""
    return Curve(((0.0, value),))


def window(start: float, stop: float, value: float = 1.0, over: Over = "fraction") -> Curve:
    """A value from ``start`` on and below ``stop``, 0 elsewhere.

    >>> [window(0.25, 0.75).value(i / 4) for i in range(4)]
    [0.0, 1.0, 1.0, 0.0]
    """
    points = [] if start == 0 else [(0.0, 0.0)]
    points += [(start, value)]
    points += [] if over == "fraction" and stop >= 1 else [(stop, 0.0)]
    return Curve(tuple(points), "hold", over)


def _eased(t: float, ease: Ease) -> float:
    """How far one is from a point to the next, 0 to 1."""
    if ease == "hold":
        return 0.0
    if ease == "smooth":
        return t * t * (3 - 2 * t)
    if ease == "in":
        return t * t
    return 1 - (1 - t) ** 2 if ease == "out" else t


def _listed(words: tuple[str, ...]) -> str:
    return ", ".join(words)
