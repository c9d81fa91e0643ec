"""What a composition puts on a pipeline comes off, and no run reaches into another."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers.hooks import ModelHook
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from cmlora.caching.policy import uniform
from cmlora.compose import compose
from cmlora.errors import CmloraError
from cmlora.plan import Member, Pass, Plan, Policy, Step
from tests import tiny
from tests.composing import NAMES, average, interrupt_after, pipeline, plain, state


@pytest.fixture(params=["sd15", "sdxl"])
def loaded(request: pytest.FixtureRequest) -> Any:
    return pipeline(request.param)


@pytest.fixture
def sd15() -> Any:
    return pipeline("sd15")


def encoded(pipe: Any) -> torch.Tensor:
    """A prompt's embedding (B, tokens, width)."""
    with torch.no_grad():
        result: torch.Tensor = pipe.encode_prompt(
            prompt="a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
    return result


def test_text_encoder_none_encodes_without_loras(loaded: Any) -> None:
    loaded.disable_lora()
    base = encoded(loaded)
    loaded.enable_lora()
    loaded.set_adapters(["ink"])
    inked = encoded(loaded)
    loaded.set_adapters(["forest"])
    with compose(loaded, ["ink"], method=average, text_encoder="none"):
        assert torch.equal(encoded(loaded), base)
    with compose(loaded, ["ink"], method=average, text_encoder="all"):
        assert torch.equal(encoded(loaded), inked)
    assert not torch.equal(base, inked)


def leave_normally(pipe: Any, **how: Any) -> None:
    with compose(pipe, NAMES, method=average, **how):
        tiny.run(pipe)


def leave_by_interrupt(pipe: Any, **how: Any) -> None:
    with pytest.raises(KeyboardInterrupt), compose(pipe, NAMES, method=average, **how):
        tiny.run(pipe, callback_on_step_end=interrupt_after(1))


def leave_by_error_in_the_model(pipe: Any, **how: Any) -> None:
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of memory")

    handle = pipe.unet.conv_out.register_forward_pre_hook(fail)
    try:
        with (
            pytest.raises(RuntimeError, match="out of memory"),
            compose(pipe, NAMES, method=average, **how),
        ):
            tiny.run(pipe)
    finally:
        handle.remove()


LEAVE = [leave_normally, leave_by_interrupt, leave_by_error_in_the_model]


@pytest.mark.parametrize(
    ("leave", "prepare"),
    [*((leave, "set") for leave in LEAVE), *((leave_normally, p) for p in ("disabled", "scaled"))],
)
def test_what_goes_on_comes_off(loaded: Any, leave: Callable[..., None], prepare: str) -> None:
    loaded.enable_lora()
    loaded.set_adapters(["forest", "ink"], [0.3, 0.9])
    if prepare == "disabled":
        loaded.disable_lora()
    elif prepare == "scaled":
        tiny.run(loaded, cross_attention_kwargs={"scale": 0.7})
    before, output = state(loaded), tiny.run(loaded)
    leave(loaded, cache="uniform:2", text_encoder="none")
    assert state(loaded) == before
    assert torch.equal(tiny.run(loaded), output)
    loaded.enable_lora()


class _Note(ModelHook):  # type: ignore[misc]
    """A hook that only notes that it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)


@pytest.mark.parametrize("when", ["before", "during"])
def test_other_hooks_stay(sd15: Any, when: str) -> None:
    from diffusers.hooks import HookRegistry

    expected = plain(sd15, "ink")
    modules = [sd15.unet, sd15.unet.mid_block]
    notes = [_Note(), _Note()]

    def register() -> None:
        for module, note in zip(modules, notes, strict=True):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(note, "note")

    if when == "before":
        register()
    try:
        with compose(sd15, NAMES, method=average, cache="uniform:2"):
            if when == "during":
                register()
            composed = tiny.run(sd15)
        counts = [note.calls for note in notes]
        assert torch.equal(plain(sd15, "ink"), expected)
        assert [note.calls - count for note, count in zip(notes, counts, strict=True)] == [4, 4]
        for module in modules:
            assert module._diffusers_hook._hook_order == ["note"]
    finally:
        for module in modules:
            module._diffusers_hook.remove_hook("note", recurse=False)
            del module._diffusers_hook, module.forward  # diffusers leaves them
    assert not torch.equal(composed, expected)


def test_offloading_around_every_run_keeps_the_composition(sd15: Any) -> None:
    from accelerate.hooks import ModelHook as OffloadHook
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    unet = sd15.unet
    before = state(sd15)
    with compose(sd15, NAMES, method=average) as composition:
        expected = tiny.run(sd15)
    add_hook_to_module(unet, OffloadHook())
    offloaded = unet.forward
    with compose(sd15, NAMES, method=average) as composition:
        for _ in range(2):
            assert torch.equal(tiny.run(sd15), expected)
            assert composition.report.calls == 12
            remove_hook_from_module(unet)  # what diffusers does at the end of a run
            add_hook_to_module(unet, OffloadHook())
    assert unet._old_forward == type(unet).forward.__get__(unet)
    assert unet.forward is not offloaded
    remove_hook_from_module(unet)
    del unet.forward  # accelerate leaves it
    assert state(sd15) == before


def test_runs_are_independent(sd15: Any) -> None:
    def eager(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
        passes = tuple(Pass({m.name: m.weight}, may_reuse=True) for m in members)
        return Plan(passes, (0.5, 0.3, 0.2))

    weights, scale = {"ink": 0.9, "alice": 1.0, "forest": 0.7}, 0.7
    with compose(sd15, weights, method=eager, cache=uniform(2)) as composition:
        first = tiny.run(sd15, steps=5)
        assert composition.report.full == dict.fromkeys(NAMES, 1)
        tiny.run(sd15, steps=3, seed=1)
        for stop in (0, 2):
            with pytest.raises(KeyboardInterrupt):
                tiny.run(sd15, steps=5, seed=2, callback_on_step_end=interrupt_after(stop))
            assert torch.equal(tiny.run(sd15, steps=5), first)
            assert composition.report.full == dict.fromkeys(NAMES, 1)
            assert composition.report.light == dict.fromkeys(NAMES, 4)
        # diffusers multiplies and divides the text encoder's scales, which loses bits
        exact = weights["alice"] * 3 / 4
        assert exact * scale / scale != exact
        tiny.run(sd15, steps=2, cross_attention_kwargs={"scale": scale})
        layers = [m for m in sd15.text_encoder.modules() if isinstance(m, BaseTunerLayer)]
        assert {layer.scaling["alice"] for layer in layers} == {exact}


def test_trainable_loras_change_no_bit() -> None:
    pipe = tiny.sdxl()
    tiny.add_loras(pipe, NAMES)
    results = []
    for trainable in (False, True):
        pipe.unet.requires_grad_(False)
        for name, parameter in pipe.unet.named_parameters():
            parameter.requires_grad_(trainable and "lora_" in name)
        with compose(pipe, NAMES, method=average):
            results.append(tiny.run(pipe))
    assert torch.equal(*results)


def test_two_compositions_at_once_are_refused(sd15: Any) -> None:
    with (
        compose(sd15, ["ink"], method=average),
        pytest.raises(CmloraError, match="already composed"),
    ):
        compose(sd15, ["alice"], method=average)
    compose(sd15, ["alice"], method=average).remove()


def test_fused_loras_are_refused() -> None:
    pipe = tiny.sd15()
    tiny.add_loras(pipe, ["ink"])
    pipe.fuse_lora()
    with pytest.raises(CmloraError, match=r"ink: fused .* pipe.unfuse_lora"):
        compose(pipe, ["ink"], method=average)


def test_remove_without_with(sd15: Any) -> None:
    before = state(sd15)
    composition = compose(sd15, ["ink"], method=average)
    assert state(sd15) != before
    composition.remove()
    composition.remove()
    assert state(sd15) == before
