"""What users say of LoRAs, and what is measured of them, on its way to the methods."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cmlora.compose import compose
from cmlora.errors import CmloraError
from cmlora.plan import Member, Plan, Policy, Step
from cmlora.strategies import METHODS
from tests import tiny
from tests.composing import NAMES, pipeline, together


def composed(**said: Any) -> dict[str, Member]:
    """The members that a method sees."""
    seen: list[Member] = []

    def watch(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
        seen[:] = members
        return together(step, members, policy)

    with compose(pipeline("sd15"), NAMES, method=watch, **said):
        tiny.run(pipeline("sd15"), steps=1)
    return {member.name: member for member in seen}


def test_labels_reach_the_method() -> None:
    found = composed(scopes={"ink": "global"}, triggers={"alice": ["alice", "girl"]})
    assert found["ink"].scope == "global"
    assert found["alice"].triggers == ("alice", "girl")
    assert found["forest"] == Member("forest")
    given = [Member(name, scope="local") for name in NAMES]
    found = composed(members=given, scopes={"ink": "global"})
    assert [found[name].scope for name in NAMES] == ["global", "local", "local"]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"scopes": {"ink": "wide"}}, "ink: scope 'wide'; expected 'global' or 'local'"),
        ({"scopes": {"inc": "global"}}, "scopes: unknown LoRA 'inc'; did you mean ink"),
        ({"triggers": {"ink": "drawing"}}, "ink: triggers 'drawing'; expected a list of words"),
    ],
)
def test_labels_that_make_no_sense(said: dict[str, Any], words: str) -> None:
    with pytest.raises(CmloraError, match=words):
        composed(**said)


def test_a_style_that_is_labelled_is_kept_everywhere() -> None:
    pipe = pipeline("sd15")
    with compose(pipe, NAMES, method="select", scopes={"ink": "global"}) as active:
        tiny.run(pipe, steps=2)
        assert set(active.report.full) == {"ink", "alice+ink", "forest+ink"}


def test_the_prompt_weighs_loras_whose_words_are_given() -> None:
    pipe = pipeline("sd15")
    said: dict[str, Any] = {"method": "w_switch", "prompt": "a red cat"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with compose(pipe, ["alice", "ink"], **said, triggers={"alice": ["cat"], "ink": ["oil"]}):
            tiny.run(pipe, steps=4)
    with pytest.warns(UserWarning, match="nothing says how much the prompt speaks of each LoRA"):
        compose(pipe, ["alice", "ink"], **said).remove()
    with pytest.warns(UserWarning, match="give prompt="):
        compose(pipe, ["alice", "ink"], method="select", prior=1.0).remove()


def test_a_lora_the_prompt_does_not_speak_of_has_no_turn() -> None:
    pipe = pipeline("sd15")
    words = {"alice": ["cat"], "ink": ["oil"]}
    with compose(
        pipe, list(words), method="w_switch", prompt="a red cat", triggers=words
    ) as active:
        tiny.run(pipe, steps=4)
        assert active.report.full == {"alice": 4}


def test_auto_knows_the_updates_and_the_length_of_the_run() -> None:
    pipe = tiny.sd15()
    tiny.add_loras(pipe, ["a", "b", "c"])
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B.c" in name:
            parameter.data *= 20
    with compose(pipe, ["a", "b", "c"], method="auto", plain=False, budget=1.15) as active:
        assert active.reason.startswith("delta")
        assert active.reason.endswith("c toned down")
        whole = tiny.run(pipe, steps=9)
        assert active.reason.startswith("delta")
        tiny.run(pipe, steps=4)
        assert active.reason.startswith("merge: in 4 steps there is nothing to reuse")
        assert set(active.report.full) == {"a+b+c"}
    with compose(pipe, ["a", "b", "c"], method="auto") as active:
        assert active.reason.startswith("gate")
    loud = METHODS["delta"].object
    with compose(pipe, ["a", "b", "c"], method=loud, every=8):
        assert not torch.allclose(tiny.run(pipe, steps=9), whole)
