"""Trigger words come and go with their LoRA; tags are read as other programs write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmlora.errors import CmloraError
from cmlora.ui.prompts import add_trigger, follow, remove_trigger, tagged, tags

_WORDS = st.text("abc ", min_size=1, max_size=8).map(str.strip).filter(bool)


@given(st.lists(_WORDS, max_size=5).map(", ".join), _WORDS)
def test_adding_and_removing_a_new_trigger_changes_nothing(prompt: str, trigger: str) -> None:
    added = add_trigger(prompt, trigger)
    assert add_trigger(added, trigger) == added
    if added != prompt and prompt:
        assert remove_trigger(added, trigger) == prompt


def test_a_trigger_is_a_word_and_not_a_part_of_one() -> None:
    assert add_trigger("a catalogue", "cat") == "a catalogue, cat"
    assert add_trigger("a Cat, sleeping", "cat") == "a Cat, sleeping"


def test_a_trigger_that_another_lora_shares_stays() -> None:
    triggers = {"one": "zorbo", "two": "zorbo"}
    assert follow("zorbo", ["one", "two"], ["two"], triggers) == "zorbo"
    assert follow("zorbo", ["two"], [], triggers) == ""


def test_loras_without_triggers_leave_the_prompt_alone() -> None:
    assert follow("a beach", [], ["plain"], {}) == "a beach"


@given(st.dictionaries(st.sampled_from(["cat", "hat", "ink"]), st.floats(-3, 3), max_size=3))
def test_tags_round_trip(loras: dict[str, float]) -> None:
    rounded = {name: float(f"{weight:g}") for name, weight in loras.items()}
    assert tags(tagged("a cat", rounded), ["cat", "hat", "ink"]) == ("a cat", rounded)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<lora:cta:1>", "did you mean cat"),
        ("<lora:cat:x>", "is not a number"),
        ("<lora:cat:nan>", "is not a number"),
        ("<lora:cat:1> <lora:cat:2>", "named twice"),
        ("<lora:ink:1>", "a/ink or b/ink"),
    ],
)
def test_tags_that_mean_nothing_are_refused(prompt: str, message: str) -> None:
    with pytest.raises(CmloraError, match=message):
        tags(prompt, ["cat", "a/ink", "b/ink"])


def test_a_third_number_in_a_tag_is_left_to_other_programs() -> None:
    assert tags("a <LORA:cat:0.5:0.7> b", ["cat"]) == ("a b", {"cat": 0.5})
