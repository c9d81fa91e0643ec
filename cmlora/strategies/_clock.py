"""Who is dominant when, and which slots are renewed: the state machine of CMLoRA.

A run is a row of *events*. At a switch event the next LoRA of the phase's set becomes dominant; at
a refresh event the dominant's cached feature is computed afresh. In between nothing changes, unless
a slot grows too old for the cache policy, which is an event too.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

from cmlora.frequency.order import single_phase


@dataclass(frozen=True)
class Era:
    """From step ``start`` on these LoRAs take turns, the early set or the late one."""

    start: int
    early: tuple[str, ...]
    late: tuple[str, ...]


@dataclass(frozen=True)
class Event:
    """What happens at a step.

    Args:
        step: when.
        dominant: the LoRA that is dominant from here to the next event.
        switches: how often the dominance was passed on so far, 0 at the first step.
        renewed: the LoRAs whose pass is full at this step.
    """

    step: int
    dominant: str
    switches: int
    renewed: frozenset[str]


def ticks(interval: float, count: int) -> tuple[int, ...]:
    """Steps of a clock that strikes every ``interval`` of a run, from step 0 on.

    >>> ticks(0.1, 200)[:4], len(ticks(0.1, 200))
    ((0, 20, 40, 60), 10)
    """
    number = math.ceil(1 / interval - 1e-9)
    return tuple(sorted({round(i * interval * count) for i in range(number)} & set(range(count))))


def spans(fraction: float, count: int) -> int:
    """The first step at or after a fraction of a run."""
    return math.ceil(fraction * count - 1e-9)


@lru_cache(maxsize=256)
def events(
    switches: tuple[int, ...],
    refreshes: tuple[int, ...],
    late: frozenset[int],
    eras: tuple[Era, ...],
    max_age: int | None,
    always: bool,
    oldest: int | None = None,
    count: int = 0,
) -> tuple[Event, ...]:
    """All events of a run, or of its part that the arguments cover.

    Args:
        switches: ascending steps of the switch clock, beginning with 0.
        refreshes: ascending steps of the refresh clock, beginning with 0.
        late: those of ``switches`` that fall into the late phase.
        eras: who takes turns, ascending by start, the first from step 0.
        max_age: a slot at least this many steps old is renewed at the next event of the two clocks,
            and all are when the phase changes; ``None`` renews nothing but the dominant's.
        always: the dominant runs in full at every step, so its slot is as old as its reign.
        oldest: a slot that becomes so many steps old is renewed at once; ``None``: never.
        count: steps of the run, of which those between the clocks are looked at for ``oldest``.
    """
    names = eras[0].early + eras[0].late
    renewed_at = dict.fromkeys(names, 0)
    turns: dict[bool, int] = {False: 0, True: 0}
    dominant, was_late, number = "", False, -1
    result: list[Event] = []
    switching = set(switches)
    clocks = switching | set(refreshes)
    for step in sorted(clocks if oldest is None else clocks | set(range(count))):
        if always and dominant:
            renewed_at[dominant] = step - 1
        changed = step == 0
        if step in switching:
            era = eras[bisect_right(eras, step, key=lambda era: era.start) - 1]
            is_late = step in late and not single_phase(era.early, era.late)
            members = era.late if is_late else era.early
            dominant = members[turns[is_late] % len(members)]
            turns[is_late] += 1
            number += 1
            changed |= is_late != was_late and max_age is not None
            was_late = is_late
        old = {n for n, at in renewed_at.items() if oldest is not None and step - at >= oldest}
        renewed = old
        if step in clocks:
            renewed = old | {
                name
                for name, at in renewed_at.items()
                if changed or name == dominant or (max_age is not None and step - at >= max_age)
            }
        renewed_at.update(dict.fromkeys(renewed, step))
        if renewed or step in clocks:
            result.append(Event(step, dominant, number, frozenset(renewed)))
    return tuple(result)


def latest(row: tuple[Event, ...], step: int) -> Event:
    """The event in force at a step."""
    return row[bisect_right(row, step, key=lambda event: event.step) - 1]
