"""What other programs are told: the same strengths at every step, or an error."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmlora.errors import CmloraError
from cmlora.plan import Step
from cmlora.schedules import export
from cmlora.schedules.curve import Curve, constant, window
from cmlora.schedules.parse import parse_schedule
from cmlora.schedules.schedule import Schedule, Track

WEIGHTS = {"a": 0.5, "b": 2.0}


def values(schedule: Schedule, weights: dict[str, float], steps: int) -> list[list[float]]:
    """Strength of every LoRA at every step, weights included."""
    return [
        [float(str(schedule.factor(n, Step(i, steps)))) * w for n, w in weights.items()]
        for i in range(steps)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "<lora:a:0@0,1@0.5><lora:b:0.25>",
        "<lora:a:1@0,0@0.5:ease=hold>",
        "<lora:a:0.2@0.1,1@0.3,0@0.9:ease=smooth>",
        "[<lora:a:1>:<lora:b:1>:0.3]",
        "<lora:a:0:1>",
        "",
    ],
)
def test_exports_are_read_back_with_the_same_strengths(text: str) -> None:
    schedule = parse_schedule(text)
    expected = values(schedule, WEIGHTS, 10)
    ones = dict.fromkeys(WEIGHTS, 1.0)
    smooth = "smooth" in text
    again = parse_schedule(export.loractl(schedule, WEIGHTS, samples=64))
    assert values(again, ones, 10) == [
        pytest.approx(row, abs=2e-3 if smooth else 1e-5) for row in expected
    ]
    assert [again.text_factor(n) for n in ones] == [
        pytest.approx(schedule.text_factor(n) * w) for n, w in WEIGHTS.items()
    ]
    written = export.prompt_control(schedule, WEIGHTS, samples=200)
    again = parse_schedule(written, order="unet:te")
    for row, other in zip(values(again, ones, 10), expected, strict=True):
        assert row == pytest.approx(other, abs=0.01)


def test_constant_schedules_are_a1111_tags() -> None:
    schedule = parse_schedule("<lora:a:0.5:0.8>")
    assert export.a1111(schedule, WEIGHTS) == "<lora:a:0.25:0.4> <lora:b:2>"
    again = parse_schedule(export.a1111(schedule, WEIGHTS))
    assert values(again, {"a": 1.0, "b": 1.0}, 3) == values(schedule, WEIGHTS, 3)


@pytest.mark.parametrize(
    ("writer", "text", "message"),
    [
        ("a1111", "<lora:a:0@0,1@1>", "one strength for the whole run"),
        ("a1111", "<lora:a:1:blocks=down>", "no curves for blocks"),
        ("loractl", "<lora:a:1@0,0@9:over=sigma>", "no curves over noise levels"),
        ("prompt_control", "<lora:a:1@0,0@9>", "fractions of a run only"),
        ("loractl", "<lora:a:1:blocks=down>", "no curves for blocks"),
        ("a1111", r"<lora:a\:b:1>", "A1111 has no form for ':' in a LoRA's name"),
        ("loractl", r"<lora:a\>b:1>", "loractl has no form for '>'"),
        ("loractl", "<lora:a=b:1>", "loractl has no form for '='"),
        ("prompt_control", r"<lora:a\:b:1>", "prompt-control has no form for ':'"),
        ("prompt_control", "<lora:a#b:1>", "prompt-control has no form for '#'"),
        ("prompt_control", "<lora:a\\b:1>", "give the LoRA another name"),
    ],
)
def test_what_has_no_form_elsewhere_is_refused(writer: str, text: str, message: str) -> None:
    schedule = parse_schedule(text)
    with pytest.raises(CmloraError, match=message):
        getattr(export, writer)(schedule, dict.fromkeys(schedule.names, 1.0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<lora:a:unet=0@0,1@1:over=step>", "0@0,1@1,1@2"),
        ("<lora:a:unet=1@0,0@1:over=step:ease=hold>", "1@0,1@1,0@1,0@2"),
        ("<lora:a:unet=1@0,0@0,1@0.5>", "0@0,1@0.5"),
        ("<lora:a:unet=1@0,1@0.5,0.3@0.5,0@0.5,1@1>", "1@0,1@0.5,0@0.5,1@1"),
        ("<lora:a:unet=1@0.2,0@0.20001:ease=hold>", "1@0.2,1@0.20001,0@0.20001"),
    ],
)
def test_loractl_is_told_steps_and_jumps(text: str, expected: str) -> None:
    written = export.loractl(parse_schedule(text), {"a": 1.0})
    assert written == f"<lora:a:te=1:unet={expected}>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<lora:a:te=1:unet=0>", "<lora:a:0:1>"),
        ("<lora:a:0>", "<lora:a:0>"),
        ("[<lora:a:1>::0]", "<lora:a:0>"),
        ("[<lora:a:1>:0.25,0.5]", "[:[<lora:a:1>::0.5]:0.25]"),
        ("<lora:a:te=0:unet=1@0,0@0.5:ease=hold>", "[<lora:a:1:0>::0.5]"),
        ("<lora:a:te=1:unet=0.5@0,0@0.5:ease=hold>", "[<lora:a:0.5:1>:<lora:a:0:1>:0.5]"),
        ("<lora:a:te=1:unet=0@0,1@1:ease=hold>", "<lora:a:0:1>"),
        ("[<lora:a:1>|<lora:b:0>:0.25]", "[SEQ:<lora:a:1>:0.25::0.5:<lora:a:1>:0.75]"),
        (
            "[<lora:b:0>|<lora:a:1>:0.25]",
            "[SEQ::0.25:<lora:a:1>:0.5::0.75:<lora:a:1>:1.0]",
        ),
    ],
)
def test_prompt_control_keeps_the_strength_in_the_text_encoders(text: str, expected: str) -> None:
    schedule = parse_schedule(text)
    written = export.prompt_control(schedule, {"a": 1.0})
    assert written == expected
    again = parse_schedule(written, order="unet:te")
    assert again.text_factor("a") == schedule.text_factor("a")


def test_a_switch_is_not_moved_by_rounding() -> None:
    """Two thirds have more digits than are shown of strengths."""
    schedule = Schedule((Track("a", window(2 / 3, 1.0)),))
    written = export.prompt_control(schedule, {"a": 1.0})
    again = parse_schedule(written, order="unet:te")
    assert values(again, {"a": 1.0}, 3) == [[0.0], [0.0], [1.0]]


STEPS = 12
fractions = st.floats(0, 1) | st.integers(0, STEPS).map(lambda step: step / STEPS)
numbers = st.floats(-2, 2)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    over: Any = draw(st.sampled_from((*["fraction"] * 4, "step", "sigma")))
    ease: Any = draw(st.sampled_from(("linear", "hold", "smooth", "in", "out")))
    some = fractions if over == "fraction" else fractions | st.integers(0, 2 * STEPS).map(float)
    places = sorted(draw(st.lists(some, min_size=1, max_size=5)))
    return Curve(tuple((place, draw(numbers)) for place in places), ease, over)


@st.composite
def windows(draw: st.DrawFn) -> Curve:
    over: Any = draw(st.sampled_from(("fraction", "step")))
    edges = fractions if over == "fraction" else st.integers(0, STEPS).map(float)
    start, stop = sorted(draw(st.tuples(edges, edges)))
    return window(start, stop, draw(numbers), over)


names = st.text("ab_ []|(),.é", min_size=1, max_size=4).filter(
    lambda name: name.strip() == name
) | st.sampled_from(["a", "b", "a_v2", "[c]", "x]:0.5]", "d>", "e=f", "#1", "a\\", "<b"])
tracks = st.builds(
    Track, names, curves() | windows() | numbers.map(constant), st.none(), st.none() | numbers
)
schedules = st.lists(tracks, max_size=3, unique_by=lambda track: track.lora).map(
    lambda found: Schedule(tuple(found))
)
PIECES = 16


def off_by(curve: Curve, writer: str) -> float:
    """By how much straight or flat pieces of a curve may miss it."""
    if writer == "a1111" or curve.ease == "hold" or curve.constant:
        return 0.0
    largest = max(value for _, value in curve.points) - min(value for _, value in curve.points)
    if writer == "loractl":
        return 0.0 if curve.ease == "linear" else largest / PIECES**2
    return 1.1 * largest / PIECES


@pytest.mark.parametrize("writer", ["a1111", "loractl", "prompt_control"])
@given(schedules, st.lists(numbers, min_size=4, max_size=4))
def test_what_is_written_has_the_same_strengths_at_every_step(
    writer: str, schedule: Schedule, drawn: list[float]
) -> None:
    weights = dict(zip([*schedule.names, "else"], drawn, strict=False))
    try:
        text = getattr(export, writer)(schedule, weights)
    except CmloraError:
        return
    again = parse_schedule(text, order="unet:te" if writer == "prompt_control" else "te:unet")
    assert set(again.names) == set(weights)
    known = {track.lora: track.curve for track in schedule.tracks}
    for name, weight in weights.items():
        slack = 2e-6 + off_by(known.get(name, constant(1.0)), writer) * abs(weight)
        for index in range(STEPS):
            step = Step(index, STEPS, sigma=1.0 - index / STEPS)
            expected = weight * float(str(schedule.factor(name, step)))
            assert again.factor(name, step) == pytest.approx(expected, abs=slack)
        text_strength = weight * schedule.text_factor(name)
        assert again.text_factor(name) == pytest.approx(text_strength, abs=2e-6)


@given(curves() | windows())
def test_loractl_makes_of_it_what_was_meant(curve: Curve) -> None:
    """Its own reading: `numpy.interp` over fractions, or over steps if a place is above 1."""
    try:
        text = export.loractl(Schedule((Track("a", curve),)), {"a": 1.0}, samples=PIECES)
    except CmloraError:
        return
    listed = re.search("unet=(.*)>", text)
    assert listed is not None
    pairs = [[float(x) for x in pair.split("@")] for pair in listed[1].split(",")]
    for index in range(STEPS):
        found = pairs[0][0]
        if len(pairs[0]) > 1:
            places = [place for _, place in pairs]
            here = index if places[-1] > 1 else index / STEPS
            found = float(np.interp(here, places, [value for value, _ in pairs]))
        expected = curve.at(Step(index, STEPS, sigma=1.0))
        assert found == pytest.approx(expected, abs=2e-6 + off_by(curve, "loractl"))
