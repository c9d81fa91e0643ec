"""One `<lora:...>` tag, as web UIs and their extensions write it, to a curve and back.

A1111: ``<lora:name:te:unet>``, one number for both. loractl: a list ``value@place`` instead of a
number, ``0@0,1@0.5``; places up to 1 are fractions of the run, larger ones steps. Block weights:
``start=``, ``stop=``, ``step=5-15``, places as well. Ours: ``over=``, which says what places are,
``ease=``, ``blocks=``. One plain number is for both parts, one list for the denoiser alone. A
backslash makes an ordinary character of ``:``, ``>`` and itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cmlora.errors import CmloraError
from cmlora.schedules.curve import Curve, constant, window
from cmlora.schedules.schedule import Track

_KEYS = ("te", "unet", "ease", "over", "blocks", "start", "stop", "step")
_SAMPLE = "<lora:name:1>, <lora:name:0@0,1@0.5> or <lora:name:te:unet>"


class ScheduleError(CmloraError):
    """A schedule that cannot be read.

    Args:
        position: of the character where it goes wrong, counted from 0.
        problem: what is wrong with it.
        text: the whole schedule.
    """

    def __init__(self, position: int, problem: str, text: str) -> None:
        self.position = position
        shown = text[max(0, position - 20) : position] + "»" + text[position : position + 20]
        shown = " ".join(shown.split())
        super().__init__(f"schedule, character {position + 1}: {problem} (at » in {shown!r})")


@dataclass(frozen=True)
class Part:
    """A piece of a text and where it begins."""

    text: str
    start: int


@dataclass(frozen=True)
class Tag:
    """What one tag says.

    Args:
        track: the curve.
        start: where the tag begins in the text.
        both: whether it gives one number for denoiser and text encoders.
    """

    track: Track
    start: int
    both: bool = False


def read_tag(whole: str, start: int, *, order: str = "te:unet") -> tuple[Tag, int]:
    """The tag that begins at a place, and where it ends.

    Args:
        whole: the text.
        start: where ``<lora:`` is.
        order: of two plain numbers: ``te:unet`` as in A1111, ``unet:te`` as in ComfyUI.

    Raises:
        ScheduleError: if it is not closed, or an argument cannot be read.
    """
    parts, end = _split(whole, start + len("<lora:"))
    name, *arguments = parts
    if not name.text.strip():
        raise ScheduleError(name.start, f"a LoRA's name is missing; write {_SAMPLE}", whole)
    positional: list[Part] = []
    named: dict[str, Part] = {}
    for part in arguments:
        key = re.match(r"\s*([A-Za-z_]+)\s*=", part.text)
        if key is None:
            if named:
                raise ScheduleError(part.start, "a plain number after a named one", whole)
            positional.append(part)
            continue
        word = key[1].lower()
        if word not in _KEYS:
            raise ScheduleError(part.start, _refusal(word), whole)
        if word in named:
            raise ScheduleError(part.start, f"{word} is given twice", whole)
        named[word] = Part(part.text[key.end() :], part.start + key.end())
    if len(positional) > 2:
        raise ScheduleError(
            positional[2].start,
            "a third number would change the rank; make a smaller file with cmlora compress",
            whole,
        )
    if order == "unet:te" and len(positional) == 2:
        positional.reverse()
    both = len(positional) == 1 and not {"te", "unet"} & set(named)
    for word, part in zip(("te", "unet"), positional, strict=False):
        if word in named:
            raise ScheduleError(named[word].start, f"{word} is given twice", whole)
        named[word] = part
    return Tag(_track(name.text.strip(), named, len(positional), whole), start, both), end


def _track(name: str, named: dict[str, Part], plain: int, whole: str) -> Track:
    over = named.get("over")
    ease = named.get("ease")
    text = named.get("te")
    unet = named.get("unet", text if plain == 1 else None)
    bounds = [named[key] for key in ("start", "stop", "step") if key in named]
    curve = constant(1.0)
    if unet is not None:
        curve = _curve(unet, over, ease, whole)
    elif not bounds and (over is not None or ease is not None):
        lonely: Any = over or ease
        raise ScheduleError(lonely.start, "there is no curve that this is about", whole)
    said = None
    if text is not None and (text is not unet or not _listed(text)):
        said = _number(text, whole, "the prompt is encoded once, before the first step")
    if bounds:
        if unet is not None and _listed(unet):
            raise ScheduleError(bounds[0].start, "a curve cannot have a window besides", whole)
        if ease is not None:
            problem = "a window is on or off and has no ease; write a curve such as 0@0,1@0.5"
            raise ScheduleError(ease.start, problem, whole)
        curve = _window(named, curve.points[0][1], whole)
    blocks = named["blocks"].text if "blocks" in named else None
    try:
        return Track(name, curve, blocks or None, said)
    except CmloraError as error:
        raise ScheduleError(named["blocks"].start, str(error), whole) from None


def _listed(part: Part) -> bool:
    """Whether it is a list of ``value@place``, and no plain number."""
    return any(sign in part.text for sign in "@,;")


def _curve(part: Part, over: Part | None, ease: Part | None, whole: str) -> Curve:
    """A number, or a list of ``value@place``."""
    points = []
    offset = part.start
    for item in re.split(r"([,;])", part.text):
        if item not in (",", ";"):
            value, at, place = item.partition("@")
            number = _number(Part(value, offset), whole)
            where = _number(Part(place, offset + len(value) + 1), whole) if at else 1.0
            points.append((where, number))
        offset += len(item)
    if not _listed(part):
        points = [(0.0, points[0][1])]
    kind = "step" if any(place > 1 for place, _ in points) else "fraction"
    options: dict[str, Any] = {"over": kind if over is None else over.text.strip()}
    if ease is not None:
        options["ease"] = ease.text.strip()
    ordered = sorted(points, key=lambda point: point[0])
    try:
        return Curve(tuple(ordered), **options)
    except CmloraError as error:
        told = next((p for p in (over, ease) if p and p.text.strip() in str(error)), part)
        raise ScheduleError(told.start, str(error).removeprefix("schedule: "), whole) from None


def _window(named: dict[str, Part], value: float, whole: str) -> Curve:
    """``start=5``, ``stop=15`` or ``step=5-15``; without ``over`` fractions if none is above 1."""
    edges: dict[str, float] = {}
    for key in ("start", "stop"):
        if key in named:
            edges[key] = _number(named[key], whole)
    if "step" in named:
        part = named["step"]
        first, dash, last = part.text.partition("-")
        if not dash or edges:
            raise ScheduleError(part.start, "write step=5-15, without start and stop", whole)
        edges["start"] = _number(Part(first, part.start), whole)
        edges["stop"] = _number(Part(last, part.start + len(first) + 1), whole)
    over = named.get("over")
    beyond = any(edge > 1 for edge in edges.values())
    kind: Any = ("step" if beyond else "fraction") if over is None else over.text.strip()
    if over is not None and kind == "fraction" and beyond:
        problem = "a fraction of the run is at most 1; write over=step for steps"
        raise ScheduleError(over.start, problem, whole)
    begin, end = edges.get("start", 0.0), edges.get("stop", math.inf)
    place = next(named[key].start for key in ("stop", "step", "start") if key in named)
    if not 0 <= begin < end:
        lower = "; the start of one over sigma is its lower noise level" if kind == "sigma" else ""
        raise ScheduleError(place, f"a window ends after it begins{lower}", whole)
    try:
        if end == math.inf:
            points = ((0.0, 0.0), (begin, value)) if begin else ((0.0, value),)
            return Curve(points, "hold", kind)
        return window(begin, end, value, kind)
    except CmloraError as error:
        where = place if over is None else over.start
        raise ScheduleError(where, str(error).removeprefix("schedule: "), whole) from None


def _number(part: Part, whole: str, why: str = "") -> float:
    try:
        value = float(part.text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or "_" in part.text:
        blank = len(part.text) - len(part.text.lstrip())
        reason = f"; {why}, so one number is enough" if why and "@" in part.text else ""
        raise ScheduleError(
            part.start + blank, f"{part.text.strip()!r} is not a number{reason}", whole
        )
    return value


def _split(whole: str, start: int) -> tuple[list[Part], int]:
    """The parts of a tag between colons, without escapes, and where the tag ends."""
    parts, text, begin, i = [], "", start, start
    while i < len(whole):
        character = whole[i]
        if character == "\\" and whole[i + 1 : i + 2] in (":", ">", "\\"):
            text += whole[i + 1]
            i += 2
            continue
        if character in ":>":
            parts.append(Part(text, begin))
            text, begin = "", i + 1
            if character == ">":
                return parts, i + 1
        else:
            text += character
        i += 1
    raise ScheduleError(start - len("<lora:"), "this tag is not closed; its > is missing", whole)


def _refusal(word: str) -> str:
    if word.startswith("hr"):
        return f"{word} is for a second pass, which there is none of; leave it out"
    if word == "dyn":
        return "dyn would change the rank; make a smaller file with cmlora compress"
    if word == "lbw":
        return "lbw names a preset of another program; write blocks=EXPRESSION instead"
    return f"unknown argument {word!r}; known: {', '.join(_KEYS)}"


def write_tag(track: Track) -> str:
    """The tag that `read_tag` turns back into the same track."""
    arguments = [] if track.text is None else [f"te={write_number(track.text)}"]
    points = track.curve.points
    if len(points) == 1 and points[0][0] == 0 and track.curve.over == "fraction":
        arguments.append(f"unet={write_number(points[0][1])}")
    else:
        arguments.append(f"unet={write_points(points)}")
        inferred = "step" if any(place > 1 for place, _ in points) else "fraction"
        if track.curve.over != inferred:
            arguments.append(f"over={track.curve.over}")
    if track.curve.ease != "linear":
        arguments.append(f"ease={track.curve.ease}")
    if track.blocks is not None:
        arguments.append(f"blocks={_escaped(track.blocks)}")
    return f"<lora:{':'.join([_escaped(track.lora), *arguments])}>"


def write_points(points: Sequence[tuple[float, float]]) -> str:
    """``value@place`` pairs separated by commas."""
    return ",".join(f"{write_number(value)}@{write_number(place)}" for place, value in points)


def write_number(value: float) -> str:
    """The shortest text that is read back as the same number."""
    return repr(value).removesuffix(".0")


def _escaped(text: str) -> str:
    return re.sub(r"([\\:>])", r"\\\1", text)
