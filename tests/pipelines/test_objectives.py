"""What learned merges are asked: at many noise levels, and how far they are from nothing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmlora.adapters.objective import Question
from cmlora.files import read
from cmlora.lora import LoRA
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.pipelines.objectives import denoise_mse, distill

SAID = {"cat": ["a cat"], "hat": ["a hat"]}


@pytest.fixture
def pipe(model_folder: Path) -> CMLoRAPipeline:
    return CMLoRAPipeline.from_pretrained(model_folder)


@pytest.fixture
def loras(lora_folder: Path) -> list[LoRA]:
    return [read(lora_folder / f"{name}.safetensors") for name in SAID]


def levels(questions: Sequence[Question]) -> list[float]:
    return [float(question.arguments["timestep"]) for question in questions]


def test_loras_share_the_noise_levels_out(pipe: CMLoRAPipeline, loras: list[LoRA]) -> None:
    found = distill(pipe, loras, prompts=SAID, steps=3, spread=2, guidance_scale=1.0)
    pipe.pipe.scheduler.set_timesteps(6)
    assert sorted(levels(found.questions)) == sorted(pipe.pipe.scheduler.timesteps.tolist())
    assert [question.asks for question in found.questions] == ["cat"] * 3 + ["hat"] * 3


def test_the_model_alone_has_a_loss_of_one(pipe: CMLoRAPipeline, loras: list[LoRA]) -> None:
    found = distill(pipe, loras, prompts=SAID, steps=2, guidance_scale=2.0)
    assert found.value(None) == pytest.approx(1, abs=1e-5)


def test_a_lora_knows_its_own_answers(pipe: CMLoRAPipeline, loras: list[LoRA]) -> None:
    found = distill(pipe, loras[:1], prompts=SAID, steps=2, guidance_scale=2.0)
    assert found.value(loras[0]) < 1e-6


def test_pictures_share_the_noise_levels_out(pipe: CMLoRAPipeline) -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(3)]
    found = levels(denoise_mse(pipe, pictures, "a cat", steps=2).questions)
    assert len(set(found)) == 6
    assert np.ptp(np.diff(sorted(found))) <= 1
    assert all(abs(b - a) == 500 for a, b in zip(found[::2], found[1::2], strict=True))
