"""`MultiLoRAGuidance` inside the denoising step of a Modular pipeline."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.modular_pipelines.modular_pipeline import BlockState
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLLoopDenoiser

from cmlora.caching.foreign import ForeignCache
from cmlora.compose import compose
from cmlora.errors import CmloraError
from cmlora.guidance import MultiLoRAGuidance
from tests import families, tiny
from tests.composing import NAMES, pipeline, state
from tests.families import embedding

WEIGHTS = {"ink": 1.0, "alice": 0.8, "forest": 0.5}


def block_state(seed: int = 0) -> BlockState:
    return BlockState(
        prompt_embeds=embedding(1, 5, 32),
        negative_prompt_embeds=embedding(1, 5, 32, seed=1),
        pooled_prompt_embeds=embedding(1, 16, seed=2),
        negative_pooled_prompt_embeds=embedding(1, 16, seed=3),
        add_time_ids=torch.ones(1, 6),
        negative_add_time_ids=torch.ones(1, 6),
        scaled_latents=tiny.latents(seed=seed),
        num_inference_steps=4,
        timestep_cond=None,
        cross_attention_kwargs=None,
    )


def step(guider: Any, index: int = 0) -> torch.Tensor:
    """What the denoising step of the Modular SDXL pipeline makes with a guider."""
    pipe = pipeline("sdxl")
    if index == 0:
        pipe.scheduler.set_timesteps(4)
    components: Any = SimpleNamespace(unet=pipe.unet, guider=guider, scheduler=pipe.scheduler)
    denoise = StableDiffusionXLLoopDenoiser()
    timestep = pipe.scheduler.timesteps[index]
    _, result = denoise(components, block_state(index), index, timestep)
    predicted: torch.Tensor = result.noise_pred
    return predicted


def expected(scale: float) -> torch.Tensor:
    """The mean over LoRAs, then classifier-free guidance."""
    unet = pipeline("sdxl").unet
    each = []
    for name, weight in WEIGHTS.items():
        unet.set_adapters([name], [weight])
        unet.requires_grad_(False)
        each.append(step(ClassifierFreeGuidance(guidance_scale=scale)))
    return torch.stack(each).mean(0)


@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_composite_with_guidance_inside(scale: float) -> None:
    wanted = expected(scale)
    pipeline("sdxl").unet.set_adapters(["forest"], [0.3])
    before = state(pipeline("sdxl"))
    guider = MultiLoRAGuidance(WEIGHTS, ClassifierFreeGuidance(guidance_scale=scale))
    torch.testing.assert_close(step(guider), wanted, rtol=1e-4, atol=1e-5)
    assert state(pipeline("sdxl")) == before
    assert guider.num_conditions == (2 if scale > 1 else 1)


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("composite", {}),
    ("switch", {}),
    ("gate", {}),
    ("auto", {}),
    ("klora", {}),
    ("multlfg", {"sharpness": 5.0}),
    ("loratorio", {"temperature": 0.1}),
    ("delta", {}),
    ("select", {"keep": "measured", "spread": 0.5}),
    ("select", {"guidance": "before"}),
    ("cmlora", {}),
    ("cmlora", {"partition": "online", "threshold": 0.7}),
]


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_both_doors_lead_to_the_same_prediction(method: str, options: dict[str, Any]) -> None:
    pipe = pipeline("sdxl")
    guider = ClassifierFreeGuidance(guidance_scale=5.0)
    components = SimpleNamespace(unet=pipe.unet, scheduler=pipe.scheduler, guider=guider)
    with compose(components, WEIGHTS, method=method, **options) as composition:
        composed = [step(guider, index) for index in range(3)]
    own = MultiLoRAGuidance(WEIGHTS, guider, method=method, options=options)
    calls = count_calls(pipe.unet)
    for index, expected in enumerate(composed):
        torch.testing.assert_close(step(own, index), expected, rtol=0, atol=1e-5)
    assert calls() == composition.report.calls


def count_calls(model: Any) -> Any:
    """How often a denoiser runs, by the calls of its first layer, from now on."""
    counted = []
    handle = model.conv_in.register_forward_hook(lambda *_: counted.append(1))

    def stop() -> int:
        handle.remove()
        return len(counted)

    return stop


@pytest.mark.parametrize(
    ("method", "plainer"), [("gate", "merge"), ("multlfg", "composite"), ("klora", "merge")]
)
def test_methods_are_not_the_plainer_ones(method: str, plainer: str) -> None:
    results = []
    for name in (method, plainer):
        guider = MultiLoRAGuidance(WEIGHTS, ClassifierFreeGuidance(5.0), method=name)
        results.append([step(guider, index) for index in range(2)][-1])
    assert not torch.allclose(results[0], results[1], atol=1e-3)


def test_what_only_a_pipeline_knows_is_asked_of_compose() -> None:
    for method, options in (("w_switch", {}), ("select", {"prior": 1.0}), ("freeswitch", {})):
        with pytest.raises(CmloraError, match=f"{method} goes by .* use cmlora.compose"):
            MultiLoRAGuidance(WEIGHTS, method=method, options=options)


def test_a_composition_and_a_guider_exclude_each_other() -> None:
    pipe = pipeline("sdxl")
    guider = MultiLoRAGuidance(WEIGHTS)
    components = SimpleNamespace(unet=pipe.unet, scheduler=pipe.scheduler)
    with (
        compose(components, WEIGHTS, method="composite"),
        pytest.raises(CmloraError, match="already composed in this denoiser"),
    ):
        step(guider)


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    unet = pipeline("sdxl").unet
    before = state(pipeline("sdxl"))
    guider = MultiLoRAGuidance(WEIGHTS)
    expected = step(guider)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        step(guider)
    handle.remove()
    assert state(pipeline("sdxl")) == before
    assert torch.equal(step(guider), expected)


def test_it_is_saved_with_the_pipeline(tmp_path: Path) -> None:
    inner = ClassifierFreeGuidance(guidance_scale=3.0, start=0.25)
    guider = MultiLoRAGuidance(WEIGHTS, inner, method="switch", options={"tau": 2})
    guider.save_pretrained(tmp_path)
    again = MultiLoRAGuidance.from_pretrained(tmp_path)
    assert again.inner.guidance_scale == 3.0
    assert again.guidance_scale == guider.guidance_scale
    for index in (0, 1, 2):
        assert torch.equal(step(again, index), step(guider, index))


def test_switching_guidance_off() -> None:
    guider = MultiLoRAGuidance(WEIGHTS, ClassifierFreeGuidance(guidance_scale=5.0))
    guider.disable()
    torch.testing.assert_close(step(guider), expected(1.0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_other_caches_keep_a_state_per_lora() -> None:
    flux = families.family("flux")
    model = flux.models()[0]
    calls: list[dict[str, Any]] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    flux.run(steps=1)
    handle.remove()
    guider = MultiLoRAGuidance(families.NAMES, ClassifierFreeGuidance(guidance_scale=2.0))

    def steps(cached: bool) -> list[torch.Tensor]:
        cache = ForeignCache(model, FirstBlockCacheConfig(10.0), lambda: 0.0) if cached else None
        results = []
        for index in range(3):
            guider.set_state(index, 3, torch.tensor(500))
            states = guider.prepare_inputs({"encoder_hidden_states": (0, 1)})
            for number, each in enumerate(states):
                guider.prepare_models(model)
                each.noise_pred = model(**calls[number])[0]
                guider.cleanup_models(model)
            results.append(guider(states)[0])
        if cache is not None:
            cache.remove()
        return results

    plain, cached = steps(False), steps(True)
    for one, other in zip(plain, cached, strict=True):  # the same input at every step
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_mistakes_are_named() -> None:
    with pytest.raises(CmloraError, match="did you mean composite"):
        MultiLoRAGuidance(WEIGHTS, method="compsite")
    with pytest.raises(CmloraError, match="no guider 'Nothing'"):
        MultiLoRAGuidance(WEIGHTS, {"_class_name": "Nothing"})
    with pytest.raises(CmloraError, match="expected one of diffusers' guiders"):
        MultiLoRAGuidance(WEIGHTS, 7.5)
    with pytest.raises(CmloraError, match="unknown LoRA 'inc'; did you mean ink"):
        step(MultiLoRAGuidance(["inc"]))


def test_names() -> None:
    assert set(WEIGHTS) == set(NAMES)
