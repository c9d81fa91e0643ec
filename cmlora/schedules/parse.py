"""Prompts with schedules in them: LoRA tags, and brackets that switch them on and off.

prompt-control's brackets: ``[<lora:a:1>::0.5]`` is a until half of the run, ``[<lora:a:1>:0.5]``
from there on, ``[<lora:a:1>:<lora:b:1>:0.5]`` first a and then b, ``[<lora:a:1>:0.2,0.6]`` a in
between, ``[before:during:after:0.2,0.6]`` three in a row, ``[SEQ:a:0.2:b:0.6]`` one after
another and then nothing, ``[a|b:0.1]`` in turns. They may be nested. A LoRA for which its brackets
leave no part of the run is never on. Brackets without a LoRA tag in them are left in the prompt as
they are.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from cmlora.schedules.curve import Curve, constant
from cmlora.schedules.schedule import Schedule, Track
from cmlora.schedules.tags import Part, ScheduleError, Tag, read_tag, write_tag

Order = Literal["te:unet", "unet:te"]

_DEPTH = 100  # far below Python's recursion limit: schedules come with others' pictures


@dataclass(frozen=True)
class Parsed:
    """A prompt and what was said in it about LoRAs.

    Args:
        prompt: the text without tags and brackets around them.
        schedule: the curves.
    """

    prompt: str
    schedule: Schedule


@dataclass
class _Bracket:
    """``[..]``: its parts between separators, each a list of texts, tags and brackets."""

    start: int
    separator: str = ":"
    parts: list[list[_Node]] = field(default_factory=list)
    end: int = 0


_Node = Part | Tag | _Bracket
_Window = tuple[float, float]


def parse(text: str, *, order: Order = "te:unet") -> Parsed:
    """Read a schedule, alone or inside a prompt.

    Args:
        text: LoRA tags in the forms of `cmlora.schedules.tags`, alone or in the brackets of this
            module, and any other text.
        order: of two plain numbers in a tag, as in A1111 or as in ComfyUI.

    Raises:
        ScheduleError: for anything that cannot be read or contradicts itself; it says at which
            character.

    >>> found = parse("a cat [<lora:ink:0.8>::0.5] on a mat")
    >>> found.prompt, found.schedule.tracks[0].curve.points
    ('a cat on a mat', ((0.0, 0.8), (0.5, 0.0)))
    """
    if "<lora:" not in text:
        return Parsed(text, Schedule())
    nodes, _ = _nodes(text, 0, "", order)
    kept: list[str] = []
    placed: list[tuple[Tag, _Window | None]] = []
    _collect(nodes, None, text, kept, placed)
    prompt = _tidy("".join(kept)) if placed else text
    return Parsed(prompt, Schedule(_tracks(placed, text)))


def parse_schedule(text: str, *, order: Order = "te:unet") -> Schedule:
    """Read a schedule that is nothing else.

    Raises:
        ScheduleError: as `parse`, and for text beside the tags.
    """
    found = parse(text, order=order)
    if found.prompt.strip():
        word = found.prompt.split()[0]
        raise ScheduleError(
            max(text.find(word), 0), f"{word!r} is no part of a schedule; write <lora:..>", text
        )
    return found.schedule


def write_schedule(schedule: Schedule) -> str:
    """The text that `parse_schedule` turns back into the same schedule."""
    return " ".join(write_tag(track) for track in schedule.tracks)


def _nodes(
    text: str, start: int, stops: str, order: Order, depth: int = 0
) -> tuple[list[_Node], int]:
    """Everything up to one of the characters in ``stops``, or to the end."""
    nodes: list[_Node] = []
    plain, begin, i = "", start, start

    def flush() -> None:
        if plain:
            nodes.append(Part(plain, begin))

    while i < len(text) and text[i] not in stops:
        if text.startswith("<lora:", i):
            flush()
            tag, i = read_tag(text, i, order=order)
            nodes.append(tag)
            plain, begin = "", i
        elif text[i] == "[":
            flush()
            bracket = _bracket(text, i, order, depth + 1)
            nodes.append(bracket)
            i = bracket.end
            plain, begin = "", i
        else:
            width = 2 if text[i] == "\\" else 1
            plain += text[i : i + width]
            i += width
    flush()
    return nodes, i


def _bracket(text: str, start: int, order: Order, depth: int) -> _Bracket:
    """The bracket that begins at a place; without an end it reaches to the end of the text."""
    if depth > _DEPTH:
        problem = f"more than {_DEPTH} brackets inside of each other; write [SEQ:..:0.2:..:0.6]"
        raise ScheduleError(start, problem, text)
    found, i = _Bracket(start), start + 1
    while True:
        part, i = _nodes(text, i, ":|]", order, depth)
        found.parts.append(part)
        if i >= len(text):
            if _has_tag(found):
                raise ScheduleError(start, "this bracket is not closed", text)
            found.end = len(text)
            return found
        if text[i] == "]":
            found.end = i + 1
            return found
        if text[i] == "|":
            found.separator = "|"
        i += 1


def _collect(
    nodes: list[_Node],
    window: _Window | None,
    text: str,
    kept: list[str],
    placed: list[tuple[Tag, _Window | None]],
) -> None:
    """Put plain text aside, and every tag with the window it is in."""
    for node in nodes:
        if isinstance(node, Part):
            if window is not None and node.text.strip(" \t\r\n,"):
                place = node.start + len(node.text) - len(node.text.lstrip(" \t\r\n,"))
                problem = "words cannot be scheduled: the prompt is encoded once"
                raise ScheduleError(place, problem, text)
            if window is None:
                kept.append(node.text)
        elif isinstance(node, Tag):
            placed.append((node, window))
        elif not _has_tag(node):
            if window is not None:
                raise ScheduleError(node.start, "words cannot be scheduled", text)
            kept.append(text[node.start : node.end])
        else:
            for part, inner in _windows(node, window or (0.0, 1.0), text):
                _collect(part, inner, text, kept, placed)


def _windows(bracket: _Bracket, outer: _Window, text: str) -> list[tuple[list[_Node], _Window]]:
    """The parts of a bracket and when each of them holds."""
    *parts, last = bracket.parts
    if bracket.separator == "|":
        return _in_turns(bracket, outer, text)
    if parts and _plain(parts[0]) == "SEQ":
        return _sequence(bracket, outer, text)
    edges = _edges(last, text)
    if not parts or edges is None:
        where = last[0] if last else None
        place = bracket.end - 1 if where is None else where.start
        raise ScheduleError(place, "a place such as 0.5 or 0.2,0.6 is expected here", text)
    if len(parts) > 3:
        raise ScheduleError(bracket.start, "a bracket has at most before, during and after", text)
    if len(edges) == 1:
        edges = [*edges, 1.0] if len(parts) == 3 else edges
    if len(edges) == 1:
        before, after = ([], parts[0]) if len(parts) == 1 else (parts[0], parts[1])
        rows = [(before, (0.0, edges[0])), (after, (edges[0], 1.0))]
    else:
        before, during, after = {
            1: ([], *parts, []),
            2: ([], *parts),
            3: tuple(parts),
        }[len(parts)]
        rows = [
            (before, (0.0, edges[0])),
            (during, (edges[0], edges[1])),
            (after, (edges[1], 1.0)),
        ]
    return [(part, (max(a, outer[0]), min(b, outer[1]))) for part, (a, b) in rows if part]


def _in_turns(bracket: _Bracket, outer: _Window, text: str) -> list[tuple[list[_Node], _Window]]:
    """``[a|b:0.1]``: every tenth of the run another one."""
    parts, length = bracket.parts, 0.1
    edges = _edges(parts[-1], text)
    if edges is not None:
        parts, length = parts[:-1], edges[0]
    if length <= 0 or length * 1000 < 1:
        raise ScheduleError(bracket.end - 1, "turns are at least 0.001 of the run", text)
    rows = []
    turns = max(0, math.ceil((outer[1] - outer[0]) / length - 1e-9))
    for turn in range(turns):
        # 3 * 0.1 is above 0.3, and would be a step late
        start, stop = (round(outer[0] + n * length, 9) for n in (turn, turn + 1))
        rows.append((parts[turn % len(parts)], (start, min(stop, outer[1]))))
    never = (outer[0], outer[0])
    return [*rows, *((part, never) for part in parts[turns:])]


def _sequence(bracket: _Bracket, outer: _Window, text: str) -> list[tuple[list[_Node], _Window]]:
    """``[SEQ:a:0.2:b:0.6]``: a until 0.2, b until 0.6."""
    rows, start = [], 0.0
    items = bracket.parts[1:]
    if len(items) % 2:
        raise ScheduleError(bracket.start, "SEQ wants pairs of a LoRA and a place", text)
    for part, place in zip(items[::2], items[1::2], strict=True):
        edges = _edges(place, text)
        if edges is None or len(edges) != 1 or edges[0] < start:
            at = place[0].start if place else bracket.start
            raise ScheduleError(at, "places of SEQ are numbers in ascending order", text)
        rows.append((part, (max(start, outer[0]), min(edges[0], outer[1]))))
        start = edges[0]
    return rows


def _edges(nodes: list[_Node], text: str) -> list[float] | None:
    """One or two places if that is what the nodes are."""
    plain = _plain(nodes)
    if plain is None or not re.fullmatch(r"[\d.eE+-]+(\s*,\s*[\d.eE+-]+)?", plain):
        return None
    try:
        edges = [float(number) for number in plain.split(",")]
    except ValueError:
        return None
    if not all(0 <= edge <= 1 for edge in edges) or sorted(edges) != edges:
        raise ScheduleError(
            nodes[0].start, f"{plain} must be fractions of the run from 0 to 1, ascending", text
        )
    return edges


def _plain(nodes: list[_Node]) -> str | None:
    """The text of nodes that are nothing but text."""
    if len(nodes) == 1 and isinstance(nodes[0], Part):
        return nodes[0].text.strip()
    return None


def _has_tag(bracket: _Bracket) -> bool:
    return any(
        isinstance(node, Tag) or (isinstance(node, _Bracket) and _has_tag(node))
        for part in bracket.parts
        for node in part
    )


def _tracks(placed: list[tuple[Tag, _Window | None]], text: str) -> tuple[Track, ...]:
    """One track per LoRA and blocks; windows of the same one become steps of one curve."""
    groups: dict[tuple[str, str | None], list[tuple[Tag, _Window | None]]] = {}
    for tag, window in placed:
        groups.setdefault((tag.track.lora, tag.track.blocks), []).append((tag, window))
    tracks = [_joined(group, text) for group in groups.values()]
    heard = {tag.track.lora for tag, place in placed if _on(place)}
    return tuple(track if track.lora in heard else replace(track, text=0.0) for track in tracks)


def _on(window: _Window | None) -> bool:
    """Whether what is in a bracket is ever on."""
    return window is None or window[0] < window[1]


def _joined(group: list[tuple[Tag, _Window | None]], text: str) -> Track:
    for tag, window in group:
        if window is not None and not tag.track.curve.constant:
            raise ScheduleError(tag.start, "a curve inside of a bracket that switches it", text)
    on = [(tag, window) for tag, window in group if _on(window)]
    if not on:
        return replace(group[0][0].track, curve=constant(0.0), text=None)
    first, window = on[0]
    if len(on) == 1 and window is None:
        return first.track
    rows = [(place or (0.0, 1.0), tag.track.curve.points[0][1], tag) for tag, place in on]
    rows.sort(key=lambda row: row[0])
    for (one, _, _), (other, _, tag) in pairwise(rows):
        if other[0] < one[1]:
            raise ScheduleError(
                max(tag.start, first.start),
                f"{tag.track.lora} is scheduled twice at {other[0]:g} of the run",
                text,
            )
    points: list[tuple[float, float]] = []
    for (start, stop), value, _ in rows:
        if points and points[-1][0] == start:
            points.pop()
        elif start > 0 and not points:
            points.append((0.0, 0.0))
        points.append((start, value))
        if stop < 1:
            points.append((stop, 0.0))
    return replace(first.track, curve=Curve(tuple(points), "hold"))


def _tidy(text: str) -> str:
    """The prompt without the gaps that tags leave."""
    text = re.sub(r"[ \t]{2,}", " ", text)
    text = re.sub(r"\s*,(\s*,)*", ",", text)
    return text.strip().strip(",").strip()
