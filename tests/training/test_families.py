"""Every family of models: the trainer asks the denoiser what the pipeline asks it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, FluxPipeline
from torch import Tensor

from cmlora import files
from cmlora.adapters.training import Example, Trainer
from cmlora.adapters.training.autoencoder import factor
from cmlora.adapters.training.conditioning import Conditioning
from cmlora.adapters.training.inputs import Latents
from cmlora.adapters.training.objective import Diffusion, Flow, objective_of
from cmlora.errors import CmloraError
from tests import families, tiny
from tests.training import bench
from tests.training.pipelines import MAKERS


def size_of(pipe: Any, width: int = 16, height: int = 16) -> tuple[int, int]:
    """Pixels of latents; Sana's pipeline takes no pictures so small."""
    if type(pipe).__name__ == "SanaPipeline":
        return 128, 128
    return width * factor(pipe), height * factor(pipe)


def run(pipe: Any, latents: Tensor, **options: Any) -> Any:
    """Runs a pipeline without classifier-free guidance from latents (B, C, H, W)."""
    name = type(pipe).__name__
    height, width = (side * factor(pipe) for side in latents.shape[2:])
    plain: dict[str, Any] = {"prompt": ["a cat"] * len(latents), "output_type": "latent"}
    plain |= {"guidance_scale": 1.0, "height": height, "width": width}
    if name in ("PixArtAlphaPipeline", "SanaPipeline"):
        plain["use_resolution_binning"] = False
    if name == "SanaPipeline":
        plain["complex_human_instruction"] = None
    if name == "ZImagePipeline":
        plain["guidance_scale"] = 0.0
    if name == "QwenImagePipeline":
        plain["guidance_scale"] = None
    if name in ("FluxPipeline", "QwenImagePipeline"):
        latents = FluxPipeline._pack_latents(latents, *latents.shape)
    if name == "Flux2Pipeline":
        latents = Flux2Pipeline._patchify_latents(latents)
        plain["guidance_scale"] = 3.5
    if name == "FluxPipeline":
        plain["guidance_scale"] = 3.5
    if name == "WanPipeline":
        latents, plain["num_frames"] = latents[:, :, None], 1
    output = pipe(latents=latents, **plain | options)
    return output.frames if name == "WanPipeline" else output.images


@pytest.mark.parametrize("family", MAKERS)
def test_the_denoiser_is_asked_as_the_pipeline_asks_it(family: str) -> None:
    pipe = MAKERS[family]()
    pipe.set_progress_bar_config(disable=True)
    conditioning = Conditioning(pipe, guidance=3.5)
    size = size_of(pipe, 16, 12)
    latents = tiny.latents(size=16)[..., : size[1] // factor(pipe), : size[0] // factor(pipe)]
    heard: list[Tensor] = []
    times: list[Tensor] = []

    def listen(_: Any, __: Any, output: Any) -> None:
        found = output[0]
        heard.append(-torch.stack(found) if isinstance(found, list) else found)
        times.append(pipe.scheduler.timesteps[:1])

    handle = conditioning.denoiser.register_forward_hook(listen)
    run(pipe, latents, num_inference_steps=3)
    handle.remove()
    arguments = conditioning.encode(["a cat"], size)
    with torch.no_grad():
        found = conditioning.predict(latents, times[0], arguments)
    expected = heard[0][:, : found.shape[1]] if family == "pixart" else heard[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MAKERS)
def test_rows_can_be_cut_apart_and_joined(family: str) -> None:
    conditioning = Conditioning(MAKERS[family]())
    size = size_of(conditioning.pipe)
    both = conditioning.encode(["a cat", "a white dog"], size)
    rows = conditioning.cut(both, size)
    one = conditioning.encode(["a white dog"], size)
    latents = tiny.latents(2, size=size[0] // factor(conditioning.pipe))
    timesteps = torch.tensor([900, 100])
    with torch.no_grad():
        joined = conditioning.predict(latents, timesteps, conditioning.join(rows, size))
        whole = conditioning.predict(latents, timesteps, both)
        single = conditioning.predict(latents[1:], timesteps[1:], one)
    assert torch.equal(joined, whole)
    torch.testing.assert_close(single, whole[1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole[0], whole[1], atol=1e-3)


@pytest.mark.parametrize("family", MAKERS)
def test_every_family_is_trained(family: str, tmp_path: Path) -> None:
    pipe = MAKERS[family]()
    latents = tiny.latents(3, size=4 if family == "sana" else 8)
    examples = [Example(one, f"a cat {number}") for number, one in enumerate(latents)]
    text = ("q_proj",) if family in ("sdxl", "sd3") else ()
    settings = bench.settings(
        tmp_path, steps=2, targets=("to_q", "to_out.0"), text_targets=text, checkpointing=True
    )
    trainer = Trainer(pipe, settings, examples)
    path = trainer.run().path
    for key, parameter in trainer.trained.items():
        assert parameter.grad is None
        # The last layer of CLIP is not heard by those who read the one before.
        if "lora_B" in key and "encoder.layers.1." not in key:
            assert bool(parameter.any()), key
    read = files.read(path)
    parts = {m.partition(".")[0] for m in read.updates}
    assert parts == set(trainer.parts.models) - {"transformer_2"}
    if text:
        assert len(trainer.parts.models) == 3


def test_what_cannot_be_trained() -> None:
    pipe = families.wan().pipe
    with pytest.raises(CmloraError, match="WanPipeline cannot be trained: with a prompt"):
        Conditioning(pipe).encode(["a"], (64, 64))
    pipe.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(CmloraError, match="Linear cannot be trained yet; known: UNet2D"):
        Conditioning(pipe)
    with pytest.raises(CmloraError, match="24x16 pixels are no multiples of 16, which this model"):
        Latents(families.qwen().pipe, [Example(torch.zeros(4, 2, 3), "")], [])


def test_objectives_of_schedulers() -> None:
    plain = tiny.scheduler()
    found = objective_of(plain, min_snr=5.0)
    assert isinstance(found, Diffusion)
    assert found.kind == "epsilon"
    assert objective_of(plain, "v").kind == "v"  # type: ignore[union-attr]
    flow = objective_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert isinstance(flow, Flow)
    assert flow.shift == 3.0
    dynamic = objective_of(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True))
    assert isinstance(dynamic, Flow)
    assert dynamic.shift == 1.0
    zero = type(plain).from_config(plain.config, rescale_betas_zero_snr=True)
    for scheduler, options, message in (
        (plain, {"kind": "flow"}, "not the scheduler of a flow"),
        (FlowMatchEulerDiscreteScheduler(), {"kind": "epsilon"}, "is of a flow model"),
        (FlowMatchEulerDiscreteScheduler(), {"min_snr": 5.0}, "min_snr is for diffusion"),
        (zero, {}, "zero terminal SNR"),
        (plain, {"timesteps": "shifted"}, "timesteps shifted is for flow models"),
    ):
        with pytest.raises(CmloraError, match=message):
            objective_of(scheduler, **options)


@pytest.mark.parametrize("kind", ["epsilon", "v", "sample"])
def test_weights_make_the_errors_of_all_targets_alike(kind: str) -> None:
    """An error of x is weighed by min(SNR, gamma), whichever target it comes through."""
    alphas = tiny.scheduler().alphas_cumprod
    objective = Diffusion(alphas, kind, min_snr=5.0)
    a = alphas[[10, 500, 990]].double()
    snr = a / (1 - a)
    # A change e of x, at the same noisy latents, changes the target by this factor.
    factors = {"sample": torch.ones(3), "epsilon": snr.sqrt(), "v": (snr + 1).sqrt()}
    expected = snr.clamp(max=5.0) / factors[kind].double() ** 2
    assert torch.allclose(objective.weight(a), expected)
    assert torch.equal(Diffusion(alphas, kind).weight(a), torch.ones(3).double())


def test_questions_can_be_answered_exactly() -> None:
    clean = tiny.latents(2)
    alphas = tiny.scheduler().alphas_cumprod
    for objective in (Diffusion(alphas, "v", noise_offset=0.3), Flow(3.0), Flow(1.0, 0.1, False)):
        question = objective.ask(clean, torch.Generator().manual_seed(0))
        again = objective.ask(clean, torch.Generator().manual_seed(0))
        assert torch.equal(question.noisy, again.noisy)
        if isinstance(objective, Flow):
            s = (question.timesteps / 1000)[:, None, None, None]
            back = question.noisy - s * question.target
        else:
            a = alphas[question.timesteps][:, None, None, None]
            back = a.sqrt() * question.noisy - (1 - a).sqrt() * question.target
        assert torch.allclose(back, clean, atol=1e-4)


def test_an_offset_moves_whole_channels() -> None:
    clean = torch.zeros(64, 4, 8, 8)
    alphas = torch.tensor([1e-9])
    for offset, expected in ((0.0, 1 / 64), (0.5, 1 / 64 + 0.25)):
        objective = Diffusion(alphas, "epsilon", noise_offset=offset)
        means = objective.ask(clean, torch.Generator().manual_seed(0)).target.mean((2, 3))
        assert float(means.var()) == pytest.approx(expected, rel=0.25)
