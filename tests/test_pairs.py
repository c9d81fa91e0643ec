"""Guidance in two calls of the denoiser gives what guidance in one doubled batch does."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance

from cmlora import denoisers
from cmlora.compose import compose
from cmlora.latents import layout
from tests import families, tiny
from tests.references_strategies import bandwise, patchwise_softmin

NAMES = ("ink", "alice", "forest")
STEPS = 4
SCALE = 4.0


def usual(_: int) -> torch.Tensor:
    """Embeddings of a negative prompt and of a prompt."""
    return families.embedding(2, 5, 16)


class Loop:
    """A denoiser that is called by hand, with guidance in one batch or in two calls."""

    def __init__(self) -> None:
        self.unet = tiny.unet_sd15(channels=(8, 16), layers_per_block=1)
        tiny.add_loras(self, NAMES)
        self.unet.double()
        self.scheduler = tiny.scheduler()
        self.guidance_scale = SCALE

    @torch.no_grad()
    def run(self, *, apart: bool, prompts: Any = None) -> list[torch.Tensor]:
        """What every step predicts, the unconditional half first."""
        self.do_classifier_free_guidance = not apart
        guider: Any = ClassifierFreeGuidance(guidance_scale=SCALE)
        self.guider = guider if apart else None
        self.scheduler.set_timesteps(STEPS)
        results = []
        for index, timestep in enumerate(self.scheduler.timesteps):
            latent = tiny.latents(seed=index).double()
            prompt = (prompts or usual)(index).double()
            if not apart:
                both = self.unet(torch.cat([latent, latent]), timestep, prompt).sample
                results.append(both)
                continue
            guider.set_state(index, STEPS, timestep)
            answers = []
            for side in (1, 0):
                guider.prepare_models(self.unet)
                answers.append(self.unet(latent, timestep, prompt[side : side + 1]).sample)
            results.append(torch.cat(answers[::-1]))
        return results


@pytest.fixture(scope="module")
def loop() -> Loop:
    return Loop()


CASES: list[tuple[str, dict[str, Any]]] = [
    ("composite", {}),
    ("loratorio", {"temperature": 0.1}),
    ("loratorio", {"top": 1, "recentre": 0.8, "temperature": 0.1}),
    ("multlfg", {"sharpness": 5.0}),
    ("multlfg", {"levels": 2, "top": 1}),
    ("multlfg", {"cache": "uniform:2"}),
    ("select", {"keep": "measured", "spread": 0.4}),
    ("cmlora", {"partition": "online", "threshold": 0.7}),
]


def assert_near(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("uncond", ["per_lora", "shared"])
@pytest.mark.parametrize(("method", "options"), CASES)
def test_both_forms_make_the_same_predictions(
    loop: Loop, method: str, options: dict[str, Any], uncond: Any
) -> None:
    results, calls = [], []
    for apart in (False, True):
        with compose(loop, NAMES, method=method, uncond=uncond, **options) as composition:
            results.append(loop.run(apart=apart))
        calls.append(composition.report.calls / (1 + apart))
    for one, other in zip(*results, strict=True):
        assert_near(other, one)
    assert calls[0] == calls[1]


def test_selection_by_guidance_lacks_the_first_conditional_prediction_only(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    results = []
    with caplog.at_level(logging.WARNING):
        for apart in (False, True):
            with compose(loop, NAMES, method="select", guidance="before"):
                results.append(loop.run(apart=apart))
    for index, (one, other) in enumerate(zip(*results, strict=True)):
        begin = 1 if index == 0 else 2
        assert_near(other[:begin], one[:begin])
    assert not torch.allclose(results[0][0], results[1][0], atol=1e-3)
    said = [record.message for record in caplog.records if record.name == "cmlora.pairs"]
    assert len(said) == 1
    assert "before there is an unconditional one" in said[0]


def test_a_prompt_that_changes_in_the_run_is_noticed(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    def prompts(index: int) -> torch.Tensor:
        whole = families.embedding(2, 5, 16)
        whole[0] += index == 2
        return whole

    results = []
    for apart in (False, True):
        with compose(loop, NAMES, method="multlfg"):
            results.append(loop.run(apart=apart, prompts=prompts))
    for index, (one, other) in enumerate(zip(*results, strict=True)):
        begin = 1 if index in (2, 3) else 2
        assert_near(other[:begin], one[:begin])
    assert "changed during the run" in caplog.text


def test_calls_nobody_can_tell_apart_are_said_to_be(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    bare = Loop()
    with compose(bare, NAMES, method="loratorio"):
        for timestep in bare.scheduler.timesteps[:1]:
            for seed in range(2):
                prompt = families.embedding(1, 5, 16, seed=seed).double()
                bare.unet(tiny.latents().double(), timestep, prompt)
    assert "this one is weighed by itself: Loop does not say" in caplog.text


class Calls:
    """Every call of a family's first denoiser: its arguments and its combined output."""

    def __init__(self, family: families.Family) -> None:
        self.model = family.models()[0]
        self.seen: list[tuple[dict[str, Any], torch.Tensor]] = []
        self.handle = self.model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, _: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        assert not args
        self.seen.append((kwargs, output[0]))

    @torch.no_grad()
    def plain(self, kwargs: dict[str, Any], names: tuple[str, ...]) -> np.ndarray[Any, Any]:
        """What single LoRAs, or the base model for "", make of these arguments, as maps."""
        rows = []
        for name in names:
            if name:
                self.model.enable_lora()
                families.activate(self.model, name)
            else:
                self.model.disable_lora()
            rows.append(self.model(**kwargs)[0])
        self.model.enable_lora()
        return np.stack([self.maps(kwargs, row) for row in rows])

    def maps(self, kwargs: dict[str, Any], output: torch.Tensor) -> np.ndarray[Any, Any]:
        """An output as maps, in double precision."""
        own = layout(denoisers.kind(self.model), kwargs["hidden_states"], kwargs.get)
        return own.unpack(output).double().numpy()


@pytest.mark.parametrize("name", ["flux", "qwen", "wan"])
def test_patches_of_both_calls_follow_the_conditional_one(name: str) -> None:
    family = families.family(name)
    calls = Calls(family)
    with compose(family.pipe, families.NAMES, method="loratorio", temperature=0.1):
        family.run(steps=4)
    calls.handle.remove()
    for index in (0, 2):
        (cond, composed), (uncond, other) = calls.seen[index : index + 2]
        rows = [calls.plain(each, ("", *sorted(families.NAMES))) for each in (uncond, cond)]
        expected = patchwise_softmin(
            np.concatenate(rows, 1), patch=2, temperature=0.1, recentre=0.5, top=0, halves=True
        )
        ours = np.concatenate([calls.maps(uncond, other), calls.maps(cond, composed)])
        np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_bands_of_guidance_are_mixed_in_two_calls(name: str) -> None:
    family = families.family(name)
    calls = Calls(family)
    with compose(family.pipe, families.NAMES, method="multlfg", sharpness=3.0) as composition:
        family.run(steps=3)
    calls.handle.remove()
    assert composition.report.calls == 3 * 2 * len(families.NAMES)
    before: list[np.ndarray[Any, Any]] | None = None
    for index in range(0, 6, 2):
        (cond, composed), (uncond, other) = calls.seen[index : index + 2]
        c, u = (calls.plain(each, tuple(sorted(families.NAMES))) for each in (cond, uncond))
        guidance = c - u
        mean = u.mean(0)
        np.testing.assert_allclose(calls.maps(uncond, other), mean, atol=2e-5)
        mixture = [
            bandwise(guidance[:, i], None if before is None else before[0][:, i], 3.0, 0)
            for i in range(guidance.shape[1])
        ]
        np.testing.assert_allclose(calls.maps(cond, composed), mean + mixture, atol=2e-5)
        before = [guidance]
