"""Whole runs of a Modular pipeline, by guider and by `compose`, against the ordinary pipeline."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLAutoBlocks
from diffusers.guiders import ClassifierFreeGuidance

from cmlora.compose import compose
from cmlora.guidance import MultiLoRAGuidance
from tests import tiny
from tests.composing import state

WEIGHTS = {"ink": 1.0, "alice": 0.8, "forest": 0.5}
PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae", "scheduler")


@pytest.fixture(scope="module")
def base() -> Any:
    """The ordinary pipeline, with LoRAs in its denoiser."""
    pipe = tiny.sdxl()
    tiny.add_loras(pipe, tuple(WEIGHTS))
    return pipe


@pytest.fixture(scope="module")
def modular(base: Any) -> Any:
    """The Modular pipeline with the components of the ordinary one."""
    made = StableDiffusionXLAutoBlocks().init_pipeline()
    parts = base.components
    made.update_components(**{name: parts[name] for name in PARTS})
    made.set_progress_bar_config(disable=True)
    return made


def run(pipe: Any, guider: Any) -> torch.Tensor:
    """The final latents of the run that `tests.tiny.run` makes."""
    pipe.update_components(guider=guider)
    result: torch.Tensor = pipe(
        prompt="a cat",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        height=32,
        width=32,
        output="latents",
    )
    return result


METHODS = ["composite", "loratorio", "multlfg", pytest.param("switch", marks=pytest.mark.slow)]


@pytest.mark.parametrize("method", METHODS)
def test_both_doors_make_the_ordinary_pipelines_picture(
    base: Any, modular: Any, method: str
) -> None:
    guidance = ClassifierFreeGuidance(guidance_scale=4.0)
    plain = run(modular, guidance)
    before = state(base)  # the run leaves a note of its own on the text encoders
    with compose(base, WEIGHTS, method=method):
        expected = tiny.run(base, steps=3)
    by_guider = run(modular, MultiLoRAGuidance(WEIGHTS, guidance, method=method))
    assert state(base) == before
    torch.testing.assert_close(by_guider, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2)
    with compose(modular, WEIGHTS, method=method) as composition:
        around = run(modular, guidance)
    torch.testing.assert_close(around, expected, rtol=1e-4, atol=1e-4)
    assert composition.report.steps == 3
