"""Slow independent references: every formula once more, in loops over plain lists and numpy."""


def nonuniform_refreshes(count: int, c1: int, c2: int) -> list[int]:
    """The published loop: walk through the run with the interval of the place one is at."""
    first, last = int(count * 0.375), int(count * 0.875)
    steps: list[int] = []
    position = 0
    while position < first:
        steps.append(position)
        position += c1
    position = first
    while position < last:
        steps.append(position)
        position += c2
    position = last
    while position < count:
        steps.append(position)
        position += c1
    return steps
