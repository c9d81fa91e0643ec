"""Predicted pictures against diffusers' schedulers."""

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from cmlora.errors import CmloraError
from cmlora.frequency.prediction import noise_level, predicted_original


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noisy, output = torch.randn(2, 1, 4, 8, 8, generator=generator)
    return noisy, output


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("family", [DDIMScheduler, DDPMScheduler])
def test_it_is_the_schedulers_own_prediction(family: Any, kind: str) -> None:
    scheduler = family(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(10)
    noisy, output = tensors()
    for timestep in scheduler.timesteps:
        ours = predicted_original(scheduler, noisy, output, float(timestep))
        theirs = scheduler.step(output, timestep, noisy).pred_original_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_it_takes_the_input_that_the_scheduler_has_scaled(kind: str) -> None:
    scheduler = EulerDiscreteScheduler(prediction_type=kind, timestep_spacing="linspace")
    scheduler.set_timesteps(7)
    noisy, output = tensors()
    assert any(float(timestep) % 1 for timestep in scheduler.timesteps)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(noisy, timestep)
        ours = predicted_original(scheduler, scaled, output, float(timestep))
        theirs = scheduler.step(output, timestep, noisy).pred_original_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_flow_matching_goes_back_along_the_velocity() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    picture, noise = tensors()
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        noisy = scheduler.scale_noise(picture, timestep[None], noise)
        torch.testing.assert_close(noisy, (1 - sigma) * picture + sigma * noise)
        ours = predicted_original(scheduler, noisy, noise - picture, float(timestep))
        torch.testing.assert_close(ours, picture, rtol=1e-4, atol=1e-4)


def test_a_schedule_that_ends_in_pure_noise_stays_finite() -> None:
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    alpha, sigma = noise_level(scheduler.alphas_cumprod, 999.0)
    assert 0 < alpha < 1e-3
    assert math.isclose(alpha**2 + sigma**2, 1)


def test_what_predicts_no_picture_is_an_error() -> None:
    noisy, output = tensors()
    scheduler = DDIMScheduler(prediction_type="score")
    with pytest.raises(CmloraError, match="DDIMScheduler with prediction type 'score'"):
        predicted_original(scheduler, noisy, output, 1.0)
