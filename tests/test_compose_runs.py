"""Compositions under every scheduler, guidance, batch and cache a pipeline can be called with."""

from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler, StableDiffusionImg2ImgPipeline

from cmlora.caching.policy import none, uniform
from cmlora.caching.unet import Cut
from cmlora.compose import compose
from cmlora.plan import Step
from tests import tiny
from tests.composing import NAMES, average, freeze, pipeline, plain


@pytest.fixture(params=["sd15", "sdxl"])
def loaded(request: pytest.FixtureRequest) -> Any:
    return pipeline(request.param)


@pytest.fixture
def sd15() -> Any:
    return pipeline("sd15")


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


def test_a_cut_is_carried_out(sd15: Any) -> None:
    results = []
    for cut in (Cut(0, 0), (0, 0), Cut(1, 0)):
        with compose(sd15, NAMES, method=average, cache="uniform:2", cut=cut):
            results.append(tiny.run(sd15))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


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
