"""Schedules in the syntax of other programs, and as a plain diffusers script.

Where a syntax has no form for something, that is an error and not an approximation; eased curves,
which loractl and prompt-control do not know, are written as ``samples`` straight or flat pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cmlora.errors import CmloraError
from cmlora.plan import Step
from cmlora.schedules.curve import Curve
from cmlora.schedules.schedule import Schedule, Track
from cmlora.schedules.tags import write_number, write_points

JUMP = 1e-4
"""loractl has no jumps: they are written as slopes this long."""

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
        CmloraError: for a curve that changes, or one for blocks.
    """
    tags = []
    for name, weight in weights.items():
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
        CmloraError: for a curve over noise levels, or one for blocks.
    """
    tags = []
    for name, weight in weights.items():
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

    Args:
        schedule: curves over fractions, not for blocks.
        weights: of all LoRAs.
        samples: flat pieces per sloping part of a curve.

    Raises:
        CmloraError: for a curve over steps or noise levels, or one for blocks.
    """
    tags = []
    for name, weight in weights.items():
        track = _only(schedule, name, "prompt-control")
        text = schedule.text_factor(name) * weight

        def tag(value: float, name: str = name, weight: float = weight, text: float = text) -> str:
            unet = value * weight
            numbers = [unet] if unet == text else [unet, text]
            return f"<lora:{':'.join([name, *map(_short, numbers)])}>" if unet else ""

        if track is None or track.curve.constant:
            tags.append(tag(1.0 if track is None else track.curve.points[0][1]))
            continue
        if track.curve.over != "fraction":
            raise CmloraError(f"{name}: prompt-control has curves over fractions of a run only")
        pieces = _flat(track.curve, samples)
        nested = tag(pieces[-1][1])
        for (_, value), (place, _) in zip(pieces[-2::-1], pieces[:0:-1], strict=True):
            nested = f"[{tag(value)}:{nested}:{_short(place)}]"
        tags.append(nested)
    return " ".join(filter(None, tags))


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


def _constant(track: Track, program: str) -> float:
    if not track.curve.constant:
        raise CmloraError(f"{track.lora}: {program} has one strength for the whole run")
    return track.curve.points[0][1]


def _straight(curve: Curve, samples: int) -> list[tuple[float, float]]:
    """Points between which a straight line is the curve, or near it."""
    found: list[tuple[float, float]] = []
    points = curve.points
    for i, (place, value) in enumerate(points):
        if found and found[-1][0] >= place:
            found[-1] = (place - JUMP, found[-1][1])  # a jump of the curve itself
        found.append((place, value))
        if i + 1 == len(points):
            break
        following = points[i + 1][0]
        if following <= place:
            continue
        if curve.ease == "hold":
            found.append((following - min(JUMP, (following - place) / 2), value))
        elif curve.ease != "linear":
            width = (following - place) / samples
            found += [
                (place + k * width, curve.value(place + k * width)) for k in range(1, samples)
            ]
    return found


def _flat(curve: Curve, samples: int) -> list[tuple[float, float]]:
    """(start, value) of flat pieces; a slope has the values in the middle of its pieces."""
    found: list[tuple[float, float]] = [(0.0, curve.value(0.0))]
    for (place, value), (following, goal) in zip(curve.points, curve.points[1:], strict=False):
        if following <= place:
            continue
        if curve.ease == "hold" or value == goal:
            found.append((place, value))
            continue
        width = (following - place) / samples
        for k in range(samples):
            start = place + k * width
            found.append((start, curve.value(start + width / 2)))
    if curve.points[-1][0] < 1:
        found.append(curve.points[-1])
    kept: list[tuple[float, float]] = []
    for place, value in found:
        if kept and kept[-1][0] == place:
            kept.pop()
        if not kept or kept[-1][1] != value:
            kept.append((place, value))
    return kept


def _short(value: float) -> str:
    """Without the digits that rounding leaves."""
    return write_number(round(value, 6))
