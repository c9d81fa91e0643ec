"""Schedules in the syntax of other programs, and as a plain diffusers script.

Where a syntax has no form for something, that is an error and not an approximation; eased curves,
which loractl does not know, and slopes, which prompt-control does not know, are written as
``samples`` straight or flat pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from cmlora.errors import CmloraError
from cmlora.plan import Step
from cmlora.schedules.curve import Curve, constant
from cmlora.schedules.schedule import Schedule, Track
from cmlora.schedules.tags import write_number, write_points

_NO_NAME = {"A1111": ":>=#\\", "loractl": ":>=#\\", "prompt-control": ":<>#\\"}
"""Characters that end a name, begin a comment or escape there or here, and have no escape there."""

_BY_PART = """parts = pipe.get_list_adapters()
first = [
    {part: text if part.startswith("text") else unet for part in parts if name in parts[part]}
    for name, unet, text in zip(names, strengths[0], spoken)
]
pipe.set_adapters(names, first)"""


def a1111(schedule: Schedule, weights: Mapping[str, float]) -> str:
    """``<lora:name:te:unet>`` for every LoRA.

    Args:
        schedule: constant curves only.
        weights: of all LoRAs; what has no curve keeps its weight.

    Raises:
        CmloraError: for a curve that changes, one for blocks, or a name that cannot be in a tag.
    """
    tags = []
    for name, weight in weights.items():
        _check_name(name, "A1111")
        track = _only(schedule, name, "A1111")
        value = 1.0 if track is None else _constant(track, "A1111")
        text = schedule.text_factor(name) * weight
        both = text == value * weight
        numbers = [text] if both else [text, value * weight]
        tags.append(f"<lora:{':'.join([name, *map(_short, numbers)])}>")
    return " ".join(tags)


def loractl(schedule: Schedule, weights: Mapping[str, float], *, samples: int = 16) -> str:
    """``<lora:name:te=1:unet=0@0,1@0.5>`` for every LoRA.

    Args:
        schedule: curves over fractions or steps, not for blocks.
        weights: of all LoRAs.
        samples: pieces per eased part of a curve.

    Raises:
        CmloraError: for a curve over noise levels, one for blocks, or a name that cannot be in a
            tag.
    """
    tags = []
    for name, weight in weights.items():
        _check_name(name, "loractl")
        track = _only(schedule, name, "loractl")
        text = _short(schedule.text_factor(name) * weight)
        if track is None or track.curve.constant:
            value = 1.0 if track is None else track.curve.points[0][1]
            tags.append(f"<lora:{name}:te={text}:unet={_short(value * weight)}>")
            continue
        if track.curve.over == "sigma":
            raise CmloraError(f"{name}: loractl has no curves over noise levels")
        points = [(place, value * weight) for place, value in _straight(track.curve, samples)]
        tags.append(f"<lora:{name}:te={text}:unet={write_points(points)}>")
    return " ".join(tags)


def prompt_control(schedule: Schedule, weights: Mapping[str, float], *, samples: int = 16) -> str:
    """``[<lora:name:unet:te>:..:0.5]`` for every LoRA, ComfyUI's order of numbers.

    Many pieces are a sequence, ``[SEQ:..:0.2:..:0.4]``. Where a LoRA is off in the denoiser, its
    tag keeps the strength in the text encoders, ``<lora:name:0:te>``. Only brackets that switch
    one number for both are written as usual, without it: `cmlora.schedules.parse` reads that
    number for the whole prompt, while prompt-control encodes the prompt anew at every switch.

    Args:
        schedule: curves over fractions, not for blocks.
        weights: of all LoRAs.
        samples: flat pieces per sloping part of a curve.

    Raises:
        CmloraError: for a curve over steps or noise levels, one for blocks, or a name that cannot
            be in a tag.
    """
    tags = []
    for name, weight in weights.items():
        _check_name(name, "prompt-control")
        track = _only(schedule, name, "prompt-control")
        curve = constant(1.0) if track is None else track.curve
        if not curve.constant and curve.over != "fraction":
            raise CmloraError(f"{name}: prompt-control has curves over fractions of a run only")
        pieces = [(place, value * weight) for place, value in _flat(curve, samples)]
        tags.append(_switched(name, pieces, schedule.text_factor(name) * weight))
    return " ".join(tags)


def _switched(name: str, pieces: Sequence[tuple[float, float]], text: float) -> str:
    """Tags in brackets of prompt-control.

    Args:
        name: of the LoRA.
        pieces: where each begins, and its strength in the denoiser.
        text: strength in the text encoders.
    """
    strengths = {value for _, value in pieces if value}
    # a LoRA without any tag would lose its strength in the text encoders
    bare = bool(strengths) and (text == 0 or strengths == {text})
    tags = []
    for _, value in pieces:
        numbers = [value] if value == text else [value, text]
        tag = f"<lora:{':'.join([name, *map(_short, numbers)])}>"
        tags.append("" if bare and not value else tag)
    places = [write_number(place) for place, _ in pieces[1:]]
    if len(pieces) > 3:
        last = [tags[-1], "1.0"] if tags[-1] else []
        listed = [word for pair in zip(tags[:-1], places, strict=True) for word in pair]
        return f"[{':'.join(['SEQ', *listed, *last])}]"
    nested = tags[-1]
    for tag, place in zip(tags[-2::-1], places[::-1], strict=True):
        nested = f"[{tag}:{nested}:{place}]"
    return nested


def diffusers(
    schedule: Schedule,
    weights: Mapping[str, float],
    steps: int,
    *,
    sigmas: Sequence[float] | None = None,
) -> str:
    """Python for a stock diffusers pipeline that does the same: merged LoRAs with these strengths.

    diffusers calls back after a step, so each strength is set for the step after it and the first
    one before the run, which is when the text encoders run.

    Args:
        schedule: curves, not for blocks.
        weights: of all LoRAs.
        steps: T; the table is for runs of this length only.
        sigmas: noise level of every step, for curves over them.

    Raises:
        CmloraError: for a curve for blocks, or over noise levels that are not given.
    """
    rows = []
    for index in range(steps):
        sigma = None if sigmas is None else sigmas[index]
        row = []
        for name, weight in weights.items():
            track = _only(schedule, name, "plain diffusers")
            step = Step(index, steps, sigma=sigma)
            row.append(weight * (1.0 if track is None else track.curve.at(step)))
        rows.append(row)
    table = "".join(f"    [{', '.join(map(write_number, row))}],\n" for row in rows)
    spoken = [schedule.text_factor(name) * weight for name, weight in weights.items()]
    apart = bool(rows) and spoken != rows[0]
    said = f"spoken = [{', '.join(map(write_number, spoken))}]  # in the text encoders\n"
    return (
        f"names = {list(weights)!r}\n"
        f"strengths = [  # one row per step, {steps} steps\n{table}]\n"
        f"{said if apart else ''}"
        "\n\n"
        "def set_strengths(pipe, index, timestep, values):\n"
        "    if index + 1 < len(strengths):\n"
        "        pipe.set_adapters(names, strengths[index + 1])\n"
        "    return values\n"
        "\n\n"
        f"{_BY_PART if apart else 'pipe.set_adapters(names, strengths[0])'}\n"
        "image = pipe(\n"
        "    prompt,\n"
        "    num_inference_steps=len(strengths),\n"
        "    callback_on_step_end=set_strengths,\n"
        ").images[0]\n"
    )


def _only(schedule: Schedule, name: str, program: str) -> Track | None:
    """A LoRA's curve, if it has one."""
    mine = [track for track in schedule.tracks if track.lora == name]
    if any(track.blocks is not None for track in mine):
        raise CmloraError(f"{name}: {program} has no curves for blocks by expression")
    return mine[0] if mine else None


def _check_name(name: str, program: str) -> None:
    """Raises `CmloraError` unless a tag can name the LoRA."""
    for character in _NO_NAME[program]:
        if character in name:
            raise CmloraError(
                f"{name}: {program} has no form for {character!r} in a LoRA's name; "
                "give the LoRA another name"
            )
    if name.strip() != name or not name:
        raise CmloraError(
            f"{name!r}: {program} has no form for a LoRA's name that is empty or has blanks at its "
            "ends; give the LoRA another name"
        )


def _constant(track: Track, program: str) -> float:
    if not track.curve.constant:
        raise CmloraError(f"{track.lora}: {program} has one strength for the whole run")
    return track.curve.points[0][1]


def _straight(curve: Curve, samples: int) -> list[tuple[float, float]]:
    """Points between which a straight line is the curve, or near it; at two of one place it jumps.

    loractl interpolates with `numpy.interp`, to which such a pair is a jump as well.
    """
    found: list[tuple[float, float]] = []
    for (place, value), (following, _) in pairwise(curve.points):
        found.append((place, value))
        if curve.ease == "hold":
            found.append((following, value))
        elif curve.ease != "linear":
            inner = _between(place, following, samples)
            found += [(x, curve.value(x)) for x in inner]
    found.append(curve.points[-1])
    if curve.over == "step" and found[-1][0] <= 1:
        found.append((2.0, found[-1][1]))  # places that are all up to 1 would be fractions
    kept: list[tuple[float, float]] = []
    for point in found:
        here = [place for place, _ in kept[-2:]].count(point[0])
        if here == 2 or (here and point[0] == 0):
            kept.pop()  # of a jump only the values before and after are seen, at 0 the one after
        if not kept or kept[-1] != point:
            kept.append(point)
    return kept


def _flat(curve: Curve, samples: int) -> list[tuple[float, float]]:
    """(start, value) of flat pieces; a slope has the values in the middle of its pieces."""
    found: list[tuple[float, float]] = [(0.0, curve.value(0.0))]
    for (place, value), (following, goal) in pairwise(curve.points):
        if following <= place:
            continue
        if curve.ease == "hold" or value == goal:
            found.append((place, value))
            continue
        edges = [place, *_between(place, following, samples), following]
        found += [(start, curve.value((start + stop) / 2)) for start, stop in pairwise(edges)]
    if curve.points[-1][0] < 1:
        found.append(curve.points[-1])
    kept: list[tuple[float, float]] = []
    for place, value in found:
        if kept and kept[-1][0] == place:
            kept.pop()
        if not kept or kept[-1][1] != value:
            kept.append((place, value))
    return kept


def _between(start: float, stop: float, samples: int) -> list[float]:
    """Places that divide a part of a curve evenly."""
    width = (stop - start) / samples
    places = (start + k * width for k in range(1, samples))
    rounded = (round(place, 6) if width > 1e-5 else place for place in places)
    return [place for place in rounded if start < place < stop]


def _short(value: float) -> str:
    """Without the digits that rounding leaves."""
    return write_number(round(value, 6))
