"""`compose` on whole pipelines: what goes on comes off, and what it computes is what it says."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler, StableDiffusionImg2ImgPipeline
from diffusers.hooks import ModelHook
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from cmlora.caching.policy import none, tally, uniform
from cmlora.caching.unet import Cut
from cmlora.compose import compose
from cmlora.errors import CmloraError
from cmlora.plan import Member, Pass, Plan, Policy, Step
from cmlora.strategies import METHODS, schedule
from tests import tiny

NAMES = ("ink", "alice", "forest")
MAKERS: dict[str, Callable[[], Any]] = {"sd15": tiny.sd15, "sdxl": tiny.sdxl}


def average(
    step: Step,
    members: Sequence[Member],
    policy: Policy,
    *,
    shares: tuple[float, ...] | None = None,
    seen: list[Step] | None = None,
) -> Plan:
    """One pass per LoRA with given or equal shares, in the user's order."""
    if seen is not None:
        seen.append(step)
    reuse = policy.reuse and step.index not in policy.refreshes(step.count)
    passes = tuple(Pass({m.name: m.weight}, may_reuse=reuse) for m in members)
    return Plan(passes, shares or tuple(1 / len(passes) for _ in passes))


def together(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
    """One pass with all LoRAs."""
    return Plan((Pass({m.name: m.weight for m in members}),))


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def loaded(request: pytest.FixtureRequest) -> Any:
    """A pipeline of each family with three LoRAs; tests leave it as they found it."""
    pipe = MAKERS[request.param]()
    tiny.add_loras(pipe, NAMES, text=True)
    return pipe


@pytest.fixture(scope="module")
def sd15() -> Any:
    pipe = tiny.sd15()
    tiny.add_loras(pipe, NAMES, text=True)
    return pipe


def state(pipe: Any) -> list[Any]:
    """Everything a composition could leave behind, as comparable values."""
    found: list[Any] = []
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, component, None)
        for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
            attributes = {
                key: value
                for key, value in vars(module).items()
                if not isinstance(value, dict | list | set | torch.Tensor)
            }
            registry = vars(module).get("_diffusers_hook")
            found.append((component, name, type(module), attributes))
            found.append(None if registry is None else list(registry._hook_order))
            if isinstance(module, BaseTunerLayer):
                active = copy.copy(module.active_adapter)
                found.append((active, module.disable_adapters, dict(module.scaling)))
            found += [(n, p.requires_grad) for n, p in module.named_parameters(recurse=False)]
    return found


def plain(pipe: Any, name: str, weight: float = 1.0, **options: Any) -> torch.Tensor:
    """One LoRA in plain diffusers; leaves the adapter state changed."""
    pipe.set_adapters([name], [weight])
    freeze(pipe)
    return tiny.run(pipe, **options)


def freeze(pipe: Any) -> None:
    """As for inference; ``requires_grad`` alone changes how kernels on a CPU round."""
    for component in ("unet", "text_encoder", "text_encoder_2"):
        if getattr(pipe, component, None) is not None:
            getattr(pipe, component).requires_grad_(False)


@pytest.mark.parametrize("weight", [1.0, 0.7])
def test_one_lora_is_plain_diffusers(loaded: Any, weight: float) -> None:
    expected = plain(loaded, "ink", weight)
    loaded.set_adapters(["alice", "forest"])
    with compose(loaded, {"ink": weight}, method=average):
        composed = tiny.run(loaded)
    assert torch.equal(composed, expected)


def test_all_loras_in_one_pass_is_set_adapters(loaded: Any) -> None:
    weights = {"ink": 0.6, "alice": 0.8, "forest": 0.3}
    loaded.set_adapters(sorted(weights), [weights[name] for name in sorted(weights)])
    freeze(loaded)
    expected = tiny.run(loaded)
    with compose(loaded, weights, method=together):
        composed = tiny.run(loaded)
    assert torch.equal(composed, expected)


def test_dictionaries_of_weights_are_no_trap(sd15: Any) -> None:
    # diffusers itself gives only the first adapter its component weight
    sd15.set_adapters(["ink", "alice"], [{"unet": 0.3}, {"unet": 0.3}])
    with compose(sd15, {"ink": 0.3, "alice": 0.3}, method=together, text_encoder="none"):
        composed = tiny.run(sd15)
        scales = {
            module.scaling[name]
            for module in sd15.unet.modules()
            if isinstance(module, BaseTunerLayer)
            for name in ("ink", "alice")
        }
    assert scales == {0.3 * 3 / 4}
    assert torch.isfinite(composed).all()


def assert_near(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of a few steps."""
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def reference_average(pipe: Any, weights: dict[str, float], steps: int = 4) -> torch.Tensor:
    """Composite written as a plain loop over single-LoRA calls inside the denoiser call."""
    forward = pipe.unet.forward

    @functools.wraps(forward)
    def looped(*args: Any, **kwargs: Any) -> Any:
        outputs = []
        for name, weight in weights.items():
            pipe.unet.set_adapters([name], [weight])
            outputs.append(forward(*args, **kwargs)[0])
        return (torch.stack(outputs).mean(0),)

    for encoder in ("text_encoder", "text_encoder_2"):
        if getattr(pipe, encoder, None) is not None:
            for module in getattr(pipe, encoder).modules():
                if isinstance(module, BaseTunerLayer):
                    module.set_adapter(sorted(weights))
                    for name, weight in weights.items():
                        module.set_scale(name, weight)
    pipe.unet.forward = looped
    try:
        return tiny.run(pipe, steps=steps)
    finally:
        del pipe.unet.forward


def test_composite_is_the_mean_of_single_lora_calls(loaded: Any) -> None:
    weights = {"ink": 1.0, "alice": 0.8, "forest": 0.5}
    expected = reference_average(loaded, weights)
    with compose(loaded, weights, method=average):
        composed = tiny.run(loaded)
    assert_near(composed, expected)


def test_one_hot_shares_are_a_switch(loaded: Any) -> None:
    with compose(loaded, ["alice"], method=average, text_encoder="none"):
        alone = tiny.run(loaded)
    with compose(loaded, NAMES, method=average, shares=(0.0, 1.0, 0.0), text_encoder="none"):
        composed = tiny.run(loaded)
    assert torch.equal(alone, composed)


def test_strengths_of_zero_are_the_base_model(loaded: Any) -> None:
    loaded.disable_lora()
    expected = tiny.run(loaded)
    loaded.enable_lora()
    for method in (average, together):
        with compose(loaded, dict.fromkeys(NAMES, 0.0), method=method):
            composed = tiny.run(loaded)
        torch.testing.assert_close(
            composed, expected, rtol=0, atol=2e-6 * float(expected.abs().max())
        )


@pytest.mark.parametrize(("method", "cache"), [("merge", "none"), ("cmlora", "uniform:2")])
def test_order_of_loading_changes_no_bit(method: str, cache: str) -> None:
    results = []
    for names in (NAMES, NAMES[::-1]):
        pipe = tiny.sd15()
        tiny.add_loras(pipe, names, text=True)
        with compose(pipe, NAMES, method=method, cache=cache):
            results.append(tiny.run(pipe))
    assert torch.equal(*results)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lorahub"])
def test_every_method_runs_what_it_plans(sd15: Any, method: str) -> None:
    with compose(sd15, NAMES, method=method, cache="nonuniform") as composition:
        result = tiny.run(sd15, steps=6)
    planned = tally(schedule(method, [Member(n) for n in NAMES], 6, "nonuniform"))
    assert torch.isfinite(result).all()
    assert composition.report.full == dict(planned.full)
    assert composition.report.light == dict(planned.light)


def test_naive_is_the_base_model_with_or_without_names(sd15: Any) -> None:
    sd15.disable_lora()
    expected = tiny.run(sd15)
    sd15.enable_lora()
    nobody: tuple[str, ...] = ()
    for loras in (nobody, NAMES):
        with compose(sd15, loras, method="naive"):
            assert_near(tiny.run(sd15), expected)


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


def interrupt_after(step: int) -> Callable[..., dict[str, Any]]:
    """A pipeline callback that acts like Ctrl-C."""

    def interrupt(_: Any, index: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            raise KeyboardInterrupt
        return values

    return interrupt


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


def test_pass_counts_follow_the_policy(loaded: Any) -> None:
    policy = uniform(3)
    with compose(loaded, NAMES, method=average, cache=policy) as composition:
        tiny.run(loaded, steps=8)
    full = len(policy.refreshes(8))
    report = composition.report
    assert report.full == dict.fromkeys(NAMES, full)
    assert report.light == dict.fromkeys(NAMES, 8 - full)
    assert (report.steps, report.calls, report.method) == (8, 24, "average")
    assert report.to_dict()["full"] == dict(report.full)
    assert report.seconds > 0


def test_a_cache_that_always_refreshes_is_no_cache(loaded: Any) -> None:
    class Always:
        name, reuse = "always", True

        def refreshes(self, count: int) -> tuple[int, ...]:
            return tuple(range(count))

    results = []
    for cache in (none(), Always()):
        with compose(loaded, NAMES, method=average, cache=cache) as composition:
            results.append(tiny.run(loaded))
        assert not composition.report.light
    assert torch.equal(*results)


def test_reuse_changes_the_picture_but_not_much(loaded: Any) -> None:
    results = []
    for cache in ("none", "uniform:2"):
        with compose(loaded, NAMES, method=average, cache=cache):
            results.append(tiny.run(loaded, steps=8))
    exact, cached = results
    error = float((exact - cached).norm() / exact.norm())
    assert 0 < error < 0.5


def test_steps_are_told_as_they_are(sd15: Any) -> None:
    seen: list[Step] = []
    with compose(sd15, NAMES, method=average, seen=seen):
        tiny.run(sd15, steps=5)
    assert [step.index for step in seen] == [0, 1, 2, 3, 4]
    assert {step.count for step in seen} == {5}
    assert [step.timestep for step in seen] == sd15.scheduler.timesteps.tolist()
    assert all(step.sample is not None and step.sample.shape == (2, 4, 16, 16) for step in seen)


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, PNDMScheduler])
def test_schedulers_that_repeat_timesteps(sd15: Any, scheduler: Any) -> None:
    kept = sd15.scheduler
    extra = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    sd15.scheduler = scheduler.from_config(kept.config, **extra)
    try:
        seen: list[Step] = []
        expected = plain(sd15, "ink", steps=5)
        with compose(sd15, ["ink"], method=average, seen=seen) as composition:
            assert torch.equal(tiny.run(sd15, steps=5), expected)
        timesteps = sd15.scheduler.timesteps.tolist()
        assert len(set(timesteps)) < len(timesteps)
        assert [step.timestep for step in seen] == timesteps
        assert [step.index for step in seen] == list(range(len(timesteps)))
        assert {step.count for step in seen} == {len(timesteps)}
        with compose(sd15, ["ink"], method=average, cache="uniform:3") as composition:
            tiny.run(sd15, steps=5)
        assert composition.report.full == {"ink": len(uniform(3).refreshes(len(timesteps)))}
    finally:
        sd15.scheduler = kept


def test_image_to_image_counts_its_own_steps(sd15: Any) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**sd15.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {
        "prompt": "a cat",
        "image": torch.zeros(1, 3, 32, 32),
        "strength": 0.6,
        "num_inference_steps": 10,
        "output_type": "latent",
    }

    def picture() -> torch.Tensor:
        result: torch.Tensor = pipe(generator=torch.Generator().manual_seed(0), **options).images
        return result

    pipe.set_adapters(["ink"])
    freeze(pipe)
    expected = picture()
    seen: list[Step] = []
    with compose(pipe, ["ink"], method=average, seen=seen):
        assert torch.equal(picture(), expected)
    assert [(step.index, step.count) for step in seen] == [(i, 6) for i in range(6)]


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2},
        {"prompt": ["a cat", "two dogs"], "negative_prompt": ["x", "y"]},
        {"cross_attention_kwargs": {"scale": 0.6}},
        {"guidance_rescale": 0.5},
    ],
)
def test_options_of_the_pipeline_mean_the_same(loaded: Any, options: dict[str, Any]) -> None:
    expected = plain(loaded, "ink", 0.9, **options)
    with compose(loaded, {"ink": 0.9}, method=average):
        assert torch.equal(tiny.run(loaded, **options), expected)
    with compose(loaded, NAMES, method=average, cache="uniform:2") as composition:
        result = tiny.run(loaded, **options)
    assert result.shape == expected.shape
    assert torch.isfinite(result).all()
    assert sum(composition.report.light.values()) == 6


def test_a_batch_is_its_pictures(loaded: Any) -> None:
    def draw(prompt: list[str], noise: torch.Tensor) -> torch.Tensor:
        with compose(loaded, NAMES, method=average, cache="uniform:2"):
            return tiny.run(loaded, prompt=prompt, latents=noise)

    noise = tiny.latents(2)
    both = draw(["a cat", "two dogs"], noise)
    single = [draw([p], noise[i : i + 1]) for i, p in enumerate(["a cat", "two dogs"])]
    torch.testing.assert_close(both, torch.cat(single), rtol=1e-4, atol=1e-4)


def test_guidance_that_stops_midway_never_meets_a_feature_of_another_shape(sd15: Any) -> None:
    def stop(pipe: Any, index: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == 2:
            pipe._guidance_scale = 1.0
            values["prompt_embeds"] = values["prompt_embeds"][-1:]
        return values

    with compose(sd15, NAMES, method=average, cache="uniform:6") as composition:
        result = tiny.run(
            sd15,
            steps=6,
            callback_on_step_end=stop,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
    assert torch.isfinite(result).all()
    assert composition.report.full == dict.fromkeys(NAMES, 2)


@pytest.mark.parametrize(
    ("loras", "options", "message"),
    [
        (["ink"], {"method": "compsite"}, "did you mean composite"),
        (["ink"], {"method": "switch", "tua": 3}, "tua"),
        (["alcie"], {}, r"unknown LoRA 'alcie'; did you mean alice\? loaded: alice, forest, ink"),
        (["zz"], {}, r"unknown LoRA 'zz'; loaded: alice, forest, ink"),
        (["ink", "ink"], {}, "ink: listed more than once"),
        ("ink", {}, "expected a list of names"),
        ([], {}, "no LoRAs to compose; name some of those that are loaded"),
        ({"ink": float("nan")}, {}, "ink: weight nan is not finite"),
        ({"ink": float("inf")}, {}, "ink: weight inf is not finite"),
        ({"ink": "1"}, {}, "ink: weight '1' is not a number"),
        ({"ink": True}, {}, "ink: weight True is not a number"),
        (["ink"], {"roles": {"ink": "loud"}}, "role 'loud'; expected 'high' or 'low'"),
        (["ink"], {"roles": {"alice": "low"}}, "roles: unknown LoRA 'alice'; composed: ink"),
        (["ink"], {"members": [Member("alice")]}, "members describe alice, but loras are ink"),
        (["ink"], {"text_encoder": "some"}, "expected 'all' or 'none'"),
        (["ink"], {"cache": "uniform:2", "cut": (0, 7)}, r"possible .*: \(0, -1\), \(0, 0\)"),
    ],
)
def test_mistakes_are_named(sd15: Any, loras: Any, options: dict[str, Any], message: str) -> None:
    before = state(sd15)
    with pytest.raises(CmloraError, match=message):
        compose(sd15, loras, **{"method": average} | options)
    assert state(sd15) == before


def test_mistakes_about_the_pipeline_are_named(sd15: Any) -> None:
    with pytest.raises(CmloraError, match="the pipeline has no LoRAs loaded"):
        compose(tiny.sd15(), ["ink"], method=average)
    with pytest.raises(CmloraError, match="none are loaded"):
        compose(tiny.sd15(), [], method=average)
    with pytest.raises(CmloraError, match="has no unet or transformer"):
        compose(object(), ["ink"], method=average)


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


def test_a_cut_is_carried_out(sd15: Any) -> None:
    results = []
    for cut in (Cut(0, 0), (0, 0), Cut(0, 1)):
        with compose(sd15, NAMES, method=average, cache="uniform:2", cut=cut):
            results.append(tiny.run(sd15))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_remove_without_with(sd15: Any) -> None:
    before = state(sd15)
    composition = compose(sd15, ["ink"], method=average)
    assert state(sd15) != before
    composition.remove()
    composition.remove()
    assert state(sd15) == before
