"""Image to image, inpainting, ControlNet, base and refiner: other calls of the same denoisers."""

from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)

from cmlora.compose import compose
from cmlora.plan import Step
from tests import tiny
from tests.composing import NAMES, assert_near, average, freeze, pipeline
from tests.test_compose import averaging, reference_average

WEIGHTS = {"ink": 1.0, "alice": 0.8, "forest": 0.5}


def picture(seed: int = 0) -> torch.Tensor:
    """A picture (1, 3, 32, 32) with values from 0 to 1."""
    return torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(seed))


def controlnet(family: str) -> tuple[Any, dict[str, Any]]:
    base = pipeline(family)
    torch.manual_seed(3)
    widths = (16, 32)  # halves the picture once, as the tiny autoencoder does
    net = ControlNetModel.from_unet(
        base.unet, conditioning_embedding_out_channels=widths, load_weights_from_unet=False
    ).eval()
    for parameter in net.parameters():  # its last layers are made with zeros
        torch.nn.init.normal_(parameter, std=0.1)
    parts = {**base.components, "controlnet": net}
    if family == "sdxl":
        return StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False), {
            "image": picture()
        }
    pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    return pipe, {"image": picture()}


def inpaint(family: str) -> tuple[Any, dict[str, Any]]:
    parts = pipeline(family).components
    pipe: Any = (
        StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)
        if family == "sdxl"
        else StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    )
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    return pipe, {"image": picture(), "mask_image": mask, "strength": 1.0}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("make", [controlnet, inpaint])
def test_tasks_compute_what_a_plain_loop_computes(make: Any, family: str) -> None:
    pipe, options = make(family)
    pipe.set_progress_bar_config(disable=True)
    pipe.set_adapters(["ink"])
    freeze(pipe)
    alone = tiny.run(pipe, steps=3, **options)
    with compose(pipe, ["ink"], method=average):
        assert torch.equal(tiny.run(pipe, steps=3, **options), alone)
    expected = reference_average(pipe, WEIGHTS, steps=3, **options)
    with compose(pipe, WEIGHTS, method=average):
        assert_near(tiny.run(pipe, steps=3, **options), expected)
    with compose(pipe, WEIGHTS, method=average, cache="uniform:2") as composition:
        tiny.run(pipe, steps=3, **options)
    # features of a steered pass hold what the ControlNet said at that step
    assert bool(composition.report.light) == (make is inpaint)


def test_base_and_refiner_share_a_run() -> None:
    base = pipeline("sdxl")
    refiner = StableDiffusionXLImg2ImgPipeline(
        **{**base.components, "scheduler": type(base.scheduler).from_config(base.scheduler.config)},
        add_watermarker=False,
    )
    refiner.set_progress_bar_config(disable=True)

    def refined(latent: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = refiner(
            prompt="a cat",
            image=latent,
            num_inference_steps=5,
            denoising_start=0.6,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        return result

    def both(cache: str, **options: Any) -> torch.Tensor:
        with compose(base, WEIGHTS, method=average, cache=cache, **options):
            latent = tiny.run(base, steps=5, denoising_end=0.6)
        with compose(refiner, NAMES, method=average, cache=cache, **options):
            return refined(latent)

    with averaging(base, WEIGHTS):
        latent = tiny.run(base, steps=5, denoising_end=0.6)
    with averaging(refiner, dict.fromkeys(NAMES, 1.0)):
        expected = refined(latent)
    assert_near(both("none"), expected)
    seen: list[Step] = []
    result = both("uniform:2", seen=seen)
    assert [(step.index, step.count) for step in seen] == [
        *((i, 3) for i in range(3)),
        *((i, 2) for i in range(2)),
    ]
    assert [step.timestep for step in seen] == sorted((s.timestep for s in seen), reverse=True)
    assert torch.equal(result, both("uniform:2"))
    assert not torch.allclose(result, expected, rtol=1e-3)
