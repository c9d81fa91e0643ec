"""Texts of web UIs and their extensions, read and written, and refused at the right character."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmlora.errors import CmloraError
from cmlora.plan import Step
from cmlora.schedules.curve import Curve, constant
from cmlora.schedules.parse import parse, parse_schedule, write_schedule
from cmlora.schedules.schedule import Schedule, Track
from cmlora.schedules.tags import ScheduleError


def strengths(text: str, lora: str = "a", steps: int = 10) -> list[float]:
    """A LoRA's strength at every step."""
    schedule = parse_schedule(text)
    found = [schedule.factor(lora, Step(i, steps)) for i in range(steps)]
    assert all(isinstance(value, float) for value in found)
    return [round(float(str(value)), 6) for value in found]


HALF = [1.0] * 5 + [0.0] * 5
NEVER = [0.0] * 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<lora:a>", [1.0] * 10),
        ("<lora:a:0.8>", [0.8] * 10),
        ("<lora:a:0.8:0.5>", [0.5] * 10),
        ("<lora:a:te=0.8:unet=0.5>", [0.5] * 10),
        ("<lora:a:unet=-1>", [-1.0] * 10),
        ("<lora:a:0@0,1@0.5>", [0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1]),
        ("<lora:a:0@0;1@0.5>", [0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1]),
        ("<lora:a:1@0.5,0@0>", [0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1]),
        ("<lora:a:0@5,1@6>", [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]),
        ("<lora:a:1:0@5,1@6>", [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]),
        ("<lora:a:1@0,0>", [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ("<lora:a:1@0,0@0.5:ease=hold>", HALF),
        ("<lora:a:1:start=3>", [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]),
        ("<lora:a:0.5:stop=0.3>", [0.5, 0.5, 0.5, 0, 0, 0, 0, 0, 0, 0]),
        ("<lora:a:1:step=2-4>", [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]),
        ("[<lora:a:1>::0.5]", HALF),
        ("[<lora:a:1>:0.5]", HALF[::-1]),
        ("[:<lora:a:1>:0.5]", HALF[::-1]),
        ("[<lora:a:1>:<lora:b:1>:0.5]", HALF),
        ("[<lora:b:1>:<lora:a:1>:0.5]", HALF[::-1]),
        ("[<lora:a:1>:0.2,0.4]", [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]),
        ("[<lora:b:1>:<lora:a:1>::0.2,0.4]", [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]),
        ("[<lora:b:1>:<lora:a:1>:<lora:c:1>:0.2]", [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("[<lora:a:1>:[<lora:a:0.5>::0.8]:0.4]", [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0, 0]),
        ("[SEQ:<lora:b:1>:0.2:<lora:a:0.5>:0.6]", [0, 0, 0.5, 0.5, 0.5, 0.5, 0, 0, 0, 0]),
        ("[<lora:a:1>|<lora:b:1>:0.2]", [1, 1, 0, 0, 1, 1, 0, 0, 1, 1]),
        ("[<lora:a:1>|<lora:b:1>]", [1, 0] * 5),
        ("[<lora:a:0.5>:<lora:a:1>:0.5]", [0.5] * 5 + [1.0] * 5),
        ("<lora:a:0.8@0>", [0.8] * 10),
        ("<lora:a:1@0,1@0.5>", [1.0] * 10),
        ("<lora:a:0.8,0.8>", [0.8] * 10),
        ("<lora:a:1:start=0:stop=1:over=step>", [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("<lora:a:start=1:over=step>", [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("<lora:a:0.5:over=step:step=0-1>", [0.5, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("<lora:a:1:stop=0.5:over=fraction>", HALF),
        ("[<lora:a:1>::0]", NEVER),
        ("[<lora:a:1>:1]", NEVER),
        ("[<lora:a:1>:0.5,0.5]", NEVER),
        ("[SEQ:<lora:a:1>:0]", NEVER),
        ("[[<lora:a:1>:0.5]::0.5]", NEVER),
        ("[[<lora:a:1>:0.7]::0.5]", NEVER),
        ("[<lora:b:1>|<lora:a:1>:1]", NEVER),
        ("[[<lora:a:1>|<lora:b:1>:0.1]::0]", NEVER),
        ("[[<lora:b:1>|<lora:a:1>:0.6]::0.5]", NEVER),
        ("[<lora:a:1>::0] [<lora:a:0.5>::0.5]", [0.5] * 5 + [0.0] * 5),
        ("[<lora:a:1>::0] <lora:a:1@0,0@0.5:ease=hold>", HALF),
        ("[<lora:a:1>::0] [<lora:a:1>:1]", NEVER),
    ],
)
def test_strengths_step_by_step(text: str, expected: list[float]) -> None:
    assert strengths(text) == expected


def test_the_prompt_keeps_its_words() -> None:
    found = parse("a (big:1.2) cat, [<lora:ink:1>::0.5], [blurry] <lora:hat:0.8>, on grass")
    assert found.prompt == "a (big:1.2) cat, [blurry], on grass"
    assert found.schedule.names == ("ink", "hat")
    untouched = "[red:blue:0.5] cat [a|b] \\[x\\] <b> 3:4"
    assert parse(untouched).prompt == untouched
    assert parse(untouched).schedule == Schedule()


def test_numbers_for_the_text_encoder() -> None:
    text = "<lora:a:0.8><lora:b:0.3:0.9><lora:c:te=0><lora:d:unet=2>"
    schedule = parse(text).schedule
    assert [schedule.text_factor(name) for name in "abcd"] == [0.8, 0.3, 0.0, 1.0]
    assert [schedule.factor(name, Step(0, 4)) for name in "abcd"] == [0.8, 0.9, 1.0, 2.0]
    comfy = parse("<lora:b:0.3:0.9>", order="unet:te").schedule
    assert (comfy.text_factor("b"), comfy.factor("b", Step(0, 4))) == (0.9, 0.3)


def test_the_text_encoder_is_told_by_the_first_tag_that_is_ever_on() -> None:
    """Brackets do not switch it: the prompt is encoded once."""
    for text, expected in [
        ("[<lora:a:0.3>:0.5]", 0.3),
        ("[<lora:a:0.3>::0] [<lora:a:0.8:0.5>:0.5]", 0.8),
        ("[<lora:a:0.3>::0] <lora:a:0.8>", 0.8),
        ("[<lora:a:0.3:0.9>::0] [<lora:a:0.8>:1]", 0.0),
        ("[<lora:a:0.3>::0] <lora:a:0.6:blocks=down>", 0.6),
        ("[<lora:a:0.3>::0]", 0.0),
        ("[<lora:a:0.8@0>:0.5]", 1.0),
        ("<lora:a:0.8@0>", 1.0),
        ("<lora:a:0.8@0,0.9@1>", 1.0),
    ]:
        assert parse_schedule(text).text_factor("a") == expected


def test_a_block_that_is_never_on_leaves_the_others_alone() -> None:
    schedule = parse_schedule("[<lora:a:1:blocks=down>::0] <lora:a:0.5>")
    assert schedule.factor("a", Step(0, 4)) == (("down", 0.0), ("", 0.5))


def test_a_window_over_noise_levels() -> None:
    levels = (14.0, 9.0, 7.0, 5.0, 1.0)
    for text, expected in [
        ("<lora:a:1:start=5:stop=9:over=sigma>", [0, 0, 1, 1, 0]),
        ("<lora:a:1:start=9:over=sigma>", [1, 1, 0, 0, 0]),
        ("<lora:a:1:stop=5:over=sigma>", [0, 0, 0, 0, 1]),
        ("<lora:a:1:step=1-5:over=sigma>", [0, 0, 0, 0, 1]),
    ]:
        schedule = parse_schedule(text)
        steps = [Step(i, 5, sigma=sigma) for i, sigma in enumerate(levels)]
        assert [schedule.factor("a", step) for step in steps] == expected


def test_blocks_by_expression() -> None:
    schedule = parse_schedule(r"<lora:a:0.5><lora:a:1@0,0@1:blocks=^down\.[0-1]\:x>")
    assert schedule.factor("a", Step(2, 4)) == ((r"^down\.[0-1]:x", 0.5), ("", 0.5))
    assert schedule.factor("a", Step(0, 4)) == ((r"^down\.[0-1]:x", 1.0), ("", 0.5))


@pytest.mark.parametrize(
    ("text", "marked", "message"),
    [
        ("<lora:a:x>", "x>", "'x' is not a number"),
        ("<lora:a:0.5:1@0,x@1>", "x@1", "'x' is not a number"),
        ("<lora:a:0@0,1@y>", "y>", "'y' is not a number"),
        ("<lora:a:1@0,1@nan>", "nan>", "is not a number"),
        ("<lora:a:1", "<lora:a:1", "not closed"),
        ("a cat <lora:a:1 on a mat", "<lora:a:1 on", "not closed"),
        ("<lora::1>", ":1>", "name is missing"),
        ("<lora:a:1:1:64>", "64>", "rank"),
        ("<lora:a:1:dyn=64>", "dyn=64", "rank"),
        ("<lora:a:1:hr=0.5>", "hr=0.5", "second pass"),
        ("<lora:a:1:lbw=ALL>", "lbw=ALL", "blocks="),
        ("<lora:a:1:colour=3>", "colour=3", "known: te, unet"),
        ("<lora:a:unet=1:unet=2>", "unet=2", "twice"),
        ("<lora:a:unet=1:2>", "2>", "after a named one"),
        ("<lora:a:te=0@0,1@1:unet=1>", "0@0,1@1", "encoded once"),
        ("<lora:a:1@0,0@1:ease=bouncy>", "bouncy>", "linear, hold"),
        ("<lora:a:1@0,0@1:over=time>", "time>", "fraction, step"),
        ("<lora:a:1@-1>", "1@-1", "0 to 1"),
        ("<lora:a:ease=hold>", "hold>", "no curve"),
        ("<lora:a:0@0,1@1:start=3>", "3>", "a window besides"),
        ("<lora:a:1:step=5>", "5>", "step=5-15"),
        ("<lora:a:1:step=9-5>", "9-5", "ends after it begins"),
        ("<lora:a:1:start=9:stop=5:over=sigma>", "5:over", "lower noise level"),
        ("<lora:a:1:start=5:stop=9:over=fraction>", "fraction>", "at most 1"),
        ("<lora:a:start=5:over=time>", "time>", "fraction, step"),
        ("<lora:a:1:start=3:ease=smooth>", "smooth>", "has no ease"),
        ("<lora:a:start=3:ease=hold>", "hold>", "has no ease"),
        ("<lora:a:0.8@0:start=3>", "3>", "a window besides"),
        ("<lora:a:te=0.8@0>", "0.8@0", "encoded once"),
        ("[<lora:a:0@0,1@1>::0]", "<lora:a:0@0", "a curve inside"),
        ("<lora:a:1:blocks=(>", "(>", "no regular expression"),
        ("<lora:a:1:blocks=(a+)+$>", "(a+)+$>", "for ever"),
        ("<lora:a:1:blocks=a.*b.*c.*d.*$>", "a.*b.*c.*d.*$>", "for ever"),
        ("<lora:a:1> <lora:b:1> <lora:a:0.5>", "<lora:a:0.5>", "twice"),
        ("[<lora:a:1>::0.5] <lora:a:0.5>", "<lora:a:0.5>", "twice"),
        ("[<lora:a:1>::0.5][<lora:a:1>:0.4]", "<lora:a:1>:0.4", "twice at 0.4"),
        ("[<lora:a:1>::0.5", "[<lora:a:1>::0.5", "not closed"),
        ("[<lora:a:1>::12]", "12]", "from 0 to 1"),
        ("[<lora:a:1>:0.6,0.2]", "0.6,0.2", "ascending"),
        ("[<lora:a:1>:half]", "half]", "a place such as 0.5"),
        ("[a red <lora:a:1>::0.5]", "a red", "words cannot be scheduled"),
        ("[<lora:a:0@0,1@1>::0.5]", "<lora:a:0@0", "a curve inside"),
        ("[<lora:a:1>:<lora:b:1>:<lora:c:1>:<lora:d:1>:0.5]", "[<lora:a", "at most before"),
        ("[SEQ:<lora:a:1>:0.5:<lora:b:1>]", "[SEQ", "pairs"),
        ("[SEQ:<lora:a:1>:0.5:<lora:b:1>:0.2]", "0.2]", "ascending"),
    ],
)
def test_a_mistake_is_pointed_at(text: str, marked: str, message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert text[caught.value.position :].startswith(marked)
    assert f"character {caught.value.position + 1}:" in str(caught.value)


def test_brackets_are_nested_up_to_a_limit() -> None:
    """Far beyond what anyone writes, and far below where Python itself gives up."""
    assert strengths("[" * 100 + "<lora:a:1>" + "::0.5]" * 100) == HALF
    for text in ("[" * 3000 + "<lora:a:1>" + "::0.5]" * 3000, "[" * 3000 + "<lora:a:1>"):
        with pytest.raises(ScheduleError, match="more than 100 brackets") as caught:
            parse(text)
        assert caught.value.position == 100
    assert parse("[" * 3000).prompt == "[" * 3000


def test_words_beside_a_schedule_are_refused() -> None:
    with pytest.raises(ScheduleError, match="'cat' is no part of a schedule"):
        parse_schedule("<lora:a:1> cat")


names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(
    lambda name: name.strip() == name
)
values = st.floats(-4, 4, allow_nan=False)


def _allowed(blocks: str) -> bool:
    try:
        Track("a", constant(1.0), blocks)
    except CmloraError:
        return False
    return True


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    over: Any = draw(st.sampled_from(("fraction", "step", "sigma")))
    top = 1 if over == "fraction" else 40
    places = sorted(draw(st.lists(st.floats(0, top), min_size=1, max_size=5)))
    points = tuple((place, draw(values)) for place in places)
    ease: Any = draw(st.sampled_from(("linear", "hold", "smooth", "in", "out")))
    return Curve(points, ease, over)


tracks = st.builds(
    Track,
    names,
    curves(),
    st.none() | st.text(min_size=1, max_size=12).filter(_allowed),
    st.none() | values,
)
schedules = st.lists(tracks, max_size=4, unique_by=lambda t: (t.lora, t.blocks)).map(
    lambda found: Schedule(tuple(found))
)


@given(schedules)
def test_a_written_schedule_is_read_back(schedule: Schedule) -> None:
    assert parse_schedule(write_schedule(schedule)) == schedule


fractions = st.integers(0, 10).map(lambda tenth: tenth / 10)
brackets = st.tuples(fractions, fractions).map(lambda ends: (min(ends), max(ends)))


@given(st.lists(brackets, min_size=1, max_size=4), st.booleans())
def test_a_lora_is_on_where_all_its_brackets_are(
    found: list[tuple[float, float]], short: bool
) -> None:
    text, first, last = "<lora:a:0.5>", 0.0, 1.0
    for start, stop in found:
        ends = f":{start}" if short and stop == 1 else f":{start},{stop}"
        text, first, last = f"[{text}{ends}]", max(first, start), min(last, stop)
    assert strengths(text) == [0.5 if first <= i / 10 < last else 0.0 for i in range(10)]


@given(st.sampled_from(("fraction", "step", "sigma")), brackets, st.integers(1, 20))
def test_a_window_is_over_what_a_curve_is(over: str, ends: tuple[float, float], size: int) -> None:
    start, stop = (edge if over == "fraction" else edge * size for edge in ends)
    if start == stop:
        return
    tag = parse_schedule(f"<lora:a:0.5:start={start}:stop={stop}:over={over}>")
    points = f"0@0,0.5@{start},0@{stop}"
    curve = parse_schedule(f"<lora:a:unet={points}:ease=hold:over={over}>")
    for index in range(10):
        step = Step(index, 10, sigma=size * (1 - index / 10))
        assert tag.factor("a", step) == curve.factor("a", step)


@given(st.text("<lora:a1@0,.;=>[]|\\ x-", max_size=40))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    refusal = None
    try:
        parse(text)
    except ScheduleError as error:
        refusal = error
    if refusal is not None:
        assert "\n" not in str(refusal)
        assert 0 <= refusal.position <= len(text)


@given(st.text(max_size=40).filter(lambda text: "<lora:" not in text))
def test_a_prompt_without_tags_stays_as_it_is(text: str) -> None:
    assert parse(text).prompt == text
