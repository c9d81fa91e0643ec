"""What a compressed model is asked: at many noise levels, and at others where it is checked."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler

from cmlora.adapters.calibration import grams
from cmlora.adapters.compression import COMPRESSIONS
from cmlora.adapters.compression.heal import Call, blocks, heal
from cmlora.adapters.compression.model import compress
from cmlora.emoji.report import plainly
from cmlora.emoji.scenes import sample
from cmlora.emoji.weights import GUIDANCE
from cmlora.pipelines.models import open_pipeline
from cmlora.pipelines.questions import away, questions
from tests import tiny

PROMPTS = ["a cat", "a hat", "ink"]


def levels(calls: list[Call]) -> list[float]:
    """The timesteps that are asked at."""
    seen: list[float] = []

    def model(timestep: Any, sample: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        seen.append(float(timestep))
        return (sample,)

    for call in calls:
        call(model)  # type: ignore[arg-type]
    return seen


def test_prompts_share_the_noise_levels_out() -> None:
    pipe = tiny.sd15()
    asked = levels(questions(pipe, PROMPTS, steps=2, spread=3))
    pipe.scheduler.set_timesteps(6)
    assert sorted(asked) == sorted(pipe.scheduler.timesteps.tolist())
    own = [set(asked[i : i + 2]) for i in (0, 2, 4)]
    checked = levels(questions(pipe, PROMPTS, steps=2, spread=3, seed=1))
    assert sorted(checked) == sorted(asked)
    assert all(not own[i] & set(checked[2 * i : 2 * i + 2]) for i in range(3))


def test_of_schedulers_with_two_calls_per_step_whole_steps_are_kept() -> None:
    pipe = tiny.sd15()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    asked = levels(questions(pipe, PROMPTS[:2], steps=2, spread=2))
    every = levels(questions(pipe, PROMPTS[:1], steps=4, spread=1))
    assert sorted(asked) == sorted(every)


@pytest.mark.slow
def test_healing_does_not_ruin_other_noise_levels() -> None:
    """Asked at the steps of one short run, a healed model was twice as far away elsewhere."""
    pipe = open_pipeline("emoji", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    rngs = [np.random.default_rng((5, index)) for index in range(4)]
    texts = [plainly(sample(rng), rng) for rng in rngs]
    original = pipe.unet
    asked = questions(pipe, texts, guidance_scale=GUIDANCE)
    checked = questions(pipe, texts, steps=3, spread=5, seed=1, guidance_scale=GUIDANCE)
    assert len(set(levels(checked)) - set(levels(asked))) > 10
    model = copy.deepcopy(original)
    moments = grams(model, lambda: [call(model) for call in asked])
    compress(model, COMPRESSIONS["rocket"].object, 0.5, moments)
    before = away(model, original, checked)
    heal(model, original, asked, 20, features=blocks(model))
    assert away(model, original, checked) < before
