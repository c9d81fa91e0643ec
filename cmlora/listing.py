"""Many names in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable

MANY = 40
"""As many names are still read."""


def listing(names: Iterable[str], shown: int = MANY) -> str:
    """Names in the order a person counts; of too many, those that differ in a number as one.

    What does not fit even so is counted.

    Args:
        names: in any order.
        shown: how many names, or groups of names, at most.

    >>> listing(["b.10", "b.2", "a"])
    'a, b.2, b.10'
    >>> listing(["b.10.q", "b.2.q", "b.3.q", "b.3.k", "a"], 3)
    'a, b.{2-3,10}.q, b.3.k'
    >>> listing(["d", "b", "c", "a"], 2)
    'a, b and 2 more'
    """
    ordered = sorted(names, key=natural)
    groups = [(name, 1) for name in ordered]
    if len(groups) > shown:
        groups = _grouped(ordered)
    rest = sum(count for _, count in groups[shown:])
    return ", ".join(name for name, _ in groups[:shown]) + (f" and {rest} more" if rest else "")


def natural(name: str) -> list[tuple[int, str]]:
    """A key by which 2 comes before 10."""
    return [(int(p), "") if p.isdecimal() else (0, p) for p in re.split(r"([0-9]{1,9})", name)]


def _grouped(names: list[str]) -> list[tuple[str, int]]:
    """Names with one of their numbers as a list of ranges, whichever number leaves fewest."""
    best: dict[tuple[str, ...], list[int]] = {(name,): [] for name in names}
    parts = [re.split(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])", name) for name in names]
    for place in range(1, min(max(map(len, parts)), 16), 2):  # keys of a file may be anything
        found: dict[tuple[str, ...], list[int]] = {}
        for name, each in zip(names, parts, strict=True):
            if place < len(each):
                ends = "".join(each[:place]), "".join(each[place + 1 :])
                found.setdefault(ends, []).append(int(each[place]))
            else:
                found[(name,)] = []
        best = min(best, found, key=len)
    rows = [(_joined(ends, numbers), len(numbers) or 1) for ends, numbers in best.items()]
    return sorted(rows, key=lambda row: natural(row[0].replace("{", "")))


def _joined(ends: tuple[str, ...], numbers: list[int]) -> str:
    """One name for all that differ in a number.

    >>> _joined(("blocks.", ".to_q"), [0, 1, 2, 7])
    'blocks.{0-2,7}.to_q'
    """
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    inner = ",".join(f"{one}" if one == last else f"{one}-{last}" for one, last in ranges)
    return (inner if len(numbers) < 2 else "{" + inner + "}").join(ends)
