"""How much a prompt speaks of each LoRA."""

import math
from collections.abc import Sequence

import pytest
import torch

from cmlora.errors import CmloraError
from cmlora.plan import Member
from cmlora.relevance import embedder, like_prompt, relevances, weighed, without, without_triggers
from tests import tiny


def letters(texts: Sequence[str]) -> torch.Tensor:
    """A text's vector: how often each letter is in it."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return torch.tensor([[float(text.count(letter)) for letter in alphabet] for text in texts])


def cosine(one: str, other: str) -> float:
    a, b = letters([one, other])
    return float(a @ b / (a.norm() * b.norm()))


def test_likeness_to_the_prompt_is_a_cosine() -> None:
    triggers = {"hat": ["red hat"], "dog": ["zorbo", "dog"], "none": []}
    found = like_prompt("a red hat on a dog", triggers, letters)
    assert found == {
        "hat": pytest.approx(cosine("a red hat on a dog", "red hat")),
        "dog": pytest.approx(cosine("a red hat on a dog", "zorbo, dog")),
    }
    assert like_prompt("a", {"none": []}, letters) == {}


def test_what_a_prompt_loses_without_its_trigger_words() -> None:
    prompt = "a red hat, a tiny dog"
    found = without_triggers(prompt, {"hat": ["red hat"], "dog": ["dog"], "cat": ["cat"]}, letters)
    assert found == {
        "hat": pytest.approx(1 - cosine(prompt, "a, a tiny dog")),
        "dog": pytest.approx(1 - cosine(prompt, "a red hat, a tiny")),
        "cat": 0.0,
    }
    assert without_triggers("a", {"cat": ["cat"], "none": []}, letters) == {"cat": 0.0}
    assert relevances("without_triggers", prompt, {"hat": ["red hat"]}, letters) == {
        "hat": found["hat"]
    }


@pytest.mark.parametrize(
    ("prompt", "phrases", "rest"),
    [
        ("zorbo, on grass", ["zorbo"], "on grass"),
        ("Zorbo bird on grass", ["zorbo"], "bird on grass"),
        ("zorbos on grass", ["zorbo"], "zorbos on grass"),
        ("a red hat and a hat", ["hat", "red hat"], "a and a"),
        ("one  two", [" "], "one  two"),
        ("1.5x, cat", ["1.5x"], "cat"),
    ],
)
def test_phrases_are_taken_out_whole(prompt: str, phrases: list[str], rest: str) -> None:
    assert without(prompt, phrases) == rest


def test_a_pipelines_own_encoder_measures_without_loras() -> None:
    pipe = tiny.sd15()
    tiny.add_loras(pipe, ["hat", "dog"], text=True)
    members = [Member("hat", triggers=("red hat",)), Member("dog", triggers=("dog",))]
    bare = embedder(tiny.sd15())
    prompt = "a red hat, dog"
    for method, kind in (("w_composite", "like_prompt"), ("w_switch", "without_triggers")):
        found = weighed(pipe, method, {}, prompt, members)
        expected = relevances(kind, prompt, {m.name: m.triggers for m in members}, bare)  # type: ignore[arg-type]
        assert {m.name: m.relevance for m in found} == pytest.approx(expected)
        assert all(math.isfinite(m.relevance or 0) for m in found)
    assert weighed(pipe, "merge", {}, prompt, members) == tuple(members)
    assert weighed(pipe, "select", {"prior": 0.0}, prompt, members) == tuple(members)
    assert weighed(pipe, "select", {"prior": 1.0}, prompt, members)[0].relevance is not None
    given = [Member("hat", triggers=("red hat",), relevance=0.25)]
    assert weighed(pipe, "w_switch", {}, prompt, given)[0].relevance == 0.25


def test_a_pipeline_without_text_encoder_says_so() -> None:
    with pytest.raises(CmloraError, match="no tokenizer and text encoder"):
        embedder(object())
