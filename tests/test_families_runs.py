"""Families in runs of every kind: guidance, batches, interrupts, schedulers, cuts, refusals."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, PixArtTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model

from cmlora import denoisers
from cmlora.compose import compose
from cmlora.errors import CmloraError
from cmlora.plan import Step
from cmlora.switching import AdapterSwitch
from tests import families, tiny
from tests.composing import average
from tests.families import NAMES, Family
from tests.test_families import activate, assert_near


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen", "sana", "wan"])
def test_two_calls_per_step_are_one_call_on_both(name: str) -> None:
    family = families.family(name)
    model = family.models()[0]
    given = first_call(family, model)

    def run(separately: bool) -> list[torch.Tensor]:
        results = []
        families.set_timesteps(family.pipe.scheduler, 4)
        for number in range(4):
            call = {**given, "hidden_states": given["hidden_states"] * (1 - 0.02 * number)}
            timestep = call["timestep"]
            family.pipe.scheduler._step_index = number
            halves = [half(call, i) for i in range(2)] if separately else [call]
            outputs = [model(**each)[0] for each in halves]
            assert timestep is call["timestep"]
            results.append(torch.cat(outputs))
        return results

    with torch.no_grad(), compose(family.pipe, NAMES, cache="uniform:2", method="composite") as c:
        together, apart = run(False), run(True)
    assert c.report.steps == 4
    assert c.report.light == dict.fromkeys(NAMES, 4)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def first_call(family: Family, model: Any) -> dict[str, Any]:
    """What the pipeline calls the denoiser with, for two different pictures."""
    calls: list[dict[str, Any]] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append({"hidden_states": next(iter(args), None), **kwargs}),
        with_kwargs=True,
    )
    try:
        family.run(steps=4)
    finally:
        handle.remove()
    call = calls[0]
    if len(call["hidden_states"]) == 2:
        return call
    kind = denoisers.kind(model)
    doubled = {}
    for key, value in call.items():
        if isinstance(value, torch.Tensor) and key not in kind.unbatched and value.ndim:
            other = value.flip(-1) if value.ndim > 2 else value
            doubled[key] = torch.cat([value, other])
        else:
            doubled[key] = value * 2 if key in kind.listed else value
    return doubled


def half(call: dict[str, Any], index: int) -> dict[str, Any]:
    """One of two pictures."""
    return {
        key: value[index : index + 1]
        if isinstance(value, torch.Tensor | list) and len(value) == 2
        else value
        for key, value in call.items()
    }


@pytest.mark.parametrize("name", ["flux", "sd3", "zimage"])
def test_pictures_of_a_batch_are_the_pictures_alone(name: str) -> None:
    family = families.family(name)
    twice: dict[str, Any] = {"num_images_per_prompt": 2}
    if name == "sd3":  # repeats embeddings that it is given only in part
        twice = {
            n: v.repeat(2, *[1] * (v.ndim - 1)) for n, v in family.call.items() if "embeds" in n
        }
    with compose(family.pipe, NAMES, method="composite", cache="uniform:2"):
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        both = family.run(generator=generators, **twice)
        alone = [family.run(seed=i) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["flux", "zimage", "wan"])
def test_an_interrupted_run_leaves_nothing_for_the_next(name: str) -> None:
    family = families.family(name)

    def stop(pipe: Any, index: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == 1
        return values

    with compose(family.pipe, NAMES, method="composite", cache="uniform:3") as composition:
        expected = family.run()
        family.run(callback_on_step_end=stop)
        assert composition.report.steps == 2
        assert torch.equal(family.run(), expected)
        assert composition.report.steps == 4


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_second_order_flow_schedulers(name: str) -> None:
    made = families.family(name)
    kept = made.pipe.scheduler
    made.pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    sigmas: dict[str, Any] = {"sigmas": None} if name == "sd3" else {}
    seen: list[Step] = []
    try:
        if name == "flux":  # hands the scheduler its own sigmas, which Heun does not take
            made.pipe.scheduler.set_timesteps = _without_sigmas(made.pipe.scheduler)
        activate(made, "ink")
        expected = made.run(**sigmas)
        with compose(made.pipe, ["ink"], method=average, seen=seen):
            assert torch.equal(made.run(**sigmas), expected)
    finally:
        made.pipe.scheduler = kept
    assert [step.index for step in seen] == list(range(7))
    assert {step.count for step in seen} == {7}


def _without_sigmas(scheduler: Any) -> Any:
    original = type(scheduler).set_timesteps.__get__(scheduler)

    def set_timesteps(
        num_inference_steps: int = 4, device: Any = None, sigmas: Any = None, mu: Any = None
    ) -> None:
        original(4, device)

    return set_timesteps


def test_both_denoisers_of_wan_take_part() -> None:
    wan = families.family("wan")
    seen: list[Step] = []
    with compose(wan.pipe, ["ink"], method=average, seen=seen, cache="uniform:3") as composition:
        wan.run(steps=6)
    assert [step.index for step in seen] == [0, 1, 2, 3, 4, 5]
    report = composition.report
    noisy = sum(step.timestep >= 500 for step in seen)
    assert 0 < noisy < 6
    # two calls per step; the second denoiser has nothing to reuse at its first one
    full = 2 * len({0, 3, noisy})
    assert (report.full, report.light) == ({"ink": full}, {"ink": 12 - full})


def test_noise_levels_are_told() -> None:
    for name in ("sd15", "flux", "wan"):
        made = families.family(name)
        seen: list[Step] = []
        with compose(made.pipe, ["ink"], method=average, seen=seen):
            made.run()
        sigmas = [step.sigma for step in seen]
        assert all(sigma is not None for sigma in sigmas)
        assert sigmas == sorted(sigmas, key=lambda s: -(s or 0))
        if name != "sd15":
            assert [s for s in made.pipe.scheduler.sigmas.tolist()][:4] == sigmas


def test_residuals_of_a_controlnet_keep_transformers_live() -> None:
    flux = families.family("flux")
    model = flux.models()[0]
    given = first_call(flux, model)
    residuals = [torch.ones(2, 16, 16)] * 2
    families.set_timesteps(flux.pipe.scheduler, 4)
    with torch.no_grad(), compose(flux.pipe, NAMES, method="composite", cache="uniform:4") as c:
        for number in range(4):
            flux.pipe.scheduler._step_index = number
            steering = {"controlnet_block_samples": residuals} if number == 1 else {}
            steered = model(**given, **steering)[0]
            if number == 1:
                composed = steered
    assert (c.report.full["ink"], c.report.light["ink"]) == (3, 1)
    expected = []
    for name in NAMES:
        activate(flux, name)
        with torch.no_grad():
            expected.append(model(**given, controlnet_block_samples=residuals)[0])
    assert_near(composed, torch.stack(expected).mean(0))


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ((0, 0), "has 5 blocks; give how many stay live"),
        ((2, 3), "together 1 to 4"),
        ((-1, 2), "cut"),
    ],
)
def test_impossible_cuts_are_named(cut: tuple[int, int], message: str) -> None:
    with pytest.raises(CmloraError, match=message):
        compose(families.family("flux").pipe, NAMES, cache="uniform:2", cut=cut)


def test_cuts_decide_what_stays_live() -> None:
    flux = families.family("flux")
    results = []
    for cut in ((1, 1), (2, 2), (1, 0), None):
        with compose(flux.pipe, NAMES, method="composite", cache="uniform:2", cut=cut):
            results.append(flux.run())
    assert torch.equal(results[1], results[3])  # the default, scaled down to five blocks
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_models_for_few_steps_refuse_to_reuse() -> None:
    made = families.flux_distilled()
    families.add_loras(made.models(), NAMES, families.TARGETS)
    made.pipe.transformer.register_to_config(guidance_embeds=False)
    made.pipe.scheduler.register_to_config(use_dynamic_shifting=False)
    with pytest.raises(CmloraError, match=r"few steps \(it is FLUX.1 schnell"):
        compose(made.pipe, NAMES, cache="uniform:2")
    compose(made.pipe, NAMES, cache="none").remove()
    zimage = families.family("zimage")
    zimage.pipe.register_to_config(_name_or_path="Tongyi-MAI/Z-Image-Turbo")
    with pytest.raises(CmloraError, match="it is Tongyi-MAI/Z-Image-Turbo"):
        compose(zimage.pipe, NAMES, cache="nonuniform")
    zimage.pipe.register_to_config(_name_or_path="Tongyi-MAI/Z-Image")
    compose(zimage.pipe, NAMES, cache="nonuniform").remove()


class Loop:
    """A denoiser with a scheduler, which is all of a pipeline that a composition needs."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
        ).eval()
        self.scheduler = tiny.scheduler()
        for name in NAMES:  # the class has no add_adapter
            config = LoraConfig(r=2, target_modules=["to_q", "to_v"])
            inject_adapter_in_model(config, self.transformer, adapter_name=name)
        for key, parameter in self.transformer.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.3)

    @torch.no_grad()
    def run(self) -> list[torch.Tensor]:
        """The outputs of four steps on nearly the same input."""
        self.scheduler.set_timesteps(4)
        outputs = []
        for number, timestep in enumerate(self.scheduler.timesteps):
            output = self.transformer(
                families.embedding(2, 4, 8, 8) * (1 - 0.02 * number),
                encoder_hidden_states=families.embedding(2, 5, 16, seed=1),
                timestep=timestep.expand(2),
            )
            outputs.append(output.sample)
        return outputs


def test_denoisers_without_loaders_compose_too() -> None:
    loop = Loop()
    singles = []
    for name in NAMES:
        AdapterSwitch(loop.transformer).activate({name: 1.0})
        singles.append(loop.run())
    expected = [torch.stack(step).mean(0) for step in zip(*singles, strict=True)]
    for execution in ("sequential", "batched"):
        with compose(loop, NAMES, method="composite", execution=execution):
            for output, wanted in zip(loop.run(), expected, strict=True):
                assert_near(output, wanted)
    with compose(loop, NAMES, method="composite", cache="uniform:2") as composition:
        outputs = loop.run()
    assert composition.report.light == dict.fromkeys(NAMES, 2)
    assert_near(outputs[0], expected[0])
    error = float((outputs[1] - expected[1]).norm() / expected[1].norm())
    assert 0 < error < 0.5
