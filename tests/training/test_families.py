"""Every family of models: the trainer asks the denoiser what the pipeline asks it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import T5Config, T5EncoderModel

from cmlora import files
from cmlora.adapters.training import Example, Trainer
from cmlora.adapters.training.conditioning import Conditioning
from cmlora.adapters.training.objective import Diffusion, Flow, objective_of
from cmlora.errors import CmloraError
from tests import families, tiny
from tests.training import bench


def t5() -> T5EncoderModel:
    torch.manual_seed(0)
    config = T5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def sd3() -> Any:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    ).eval()
    return StableDiffusion3Pipeline(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny.vae(),
        text_encoder=tiny.text_encoder(projection=True),
        tokenizer=tiny.tokenizer(),
        text_encoder_2=tiny.text_encoder(projection=True, seed=1),
        tokenizer_2=tiny.tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux() -> Any:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny.vae(),
        text_encoder=tiny.text_encoder(),
        tokenizer=tiny.tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tiny.tokenizer(),
        transformer=model,
    )


def pixart() -> Any:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        use_additional_conditions=False,
    ).eval()
    return PixArtAlphaPipeline(
        tokenizer=tiny.tokenizer(),
        text_encoder=t5(),
        vae=tiny.vae(),
        transformer=model,
        scheduler=tiny.scheduler(),
    )


def sana() -> Any:
    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
    ).eval()
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return SanaPipeline(
        tokenizer=tiny.tokenizer(),
        text_encoder=t5(),
        vae=None,
        transformer=model,
        scheduler=scheduler,
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "sd15": bench.pipeline,
    "sdxl": tiny.sdxl,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "sana": sana,
}


@pytest.mark.parametrize("family", MAKERS)
def test_the_denoiser_is_asked_as_the_pipeline_asks_it(family: str) -> None:
    pipe = MAKERS[family]()
    pipe.set_progress_bar_config(disable=True)
    conditioning = Conditioning(pipe, guidance=3.5)
    factor = int(pipe.vae_scale_factor)
    size = (16 * factor, 12 * factor) if family != "sana" else (128, 128)
    latents = tiny.latents(size=16)[..., : size[1] // factor, : size[0] // factor]
    heard: list[torch.Tensor] = []
    times: list[torch.Tensor] = []

    def listen(_: Any, __: Any, output: Any) -> None:
        heard.append(output[0])
        times.append(pipe.scheduler.timesteps[:1])

    handle = conditioning.denoiser.register_forward_hook(listen)
    options: dict[str, Any] = {
        "guidance_scale": 3.5 if family == "flux" else 1.0,
        "width": size[0],
        "height": size[1],
        "output_type": "latent",
        "num_inference_steps": 3,
    }
    if family in ("pixart", "sana"):
        options["use_resolution_binning"] = False
    if family == "sana":
        options["complex_human_instruction"] = None
    pipe("a cat", latents=conditioning.prepared(latents), **options)
    handle.remove()
    arguments = conditioning.encode(["a cat"], size)
    with torch.no_grad():
        found = conditioning.predict(latents, times[0], arguments)
    expected = heard[0][:, : found.shape[1]] if family == "pixart" else heard[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MAKERS)
def test_rows_can_be_cut_apart_and_joined(family: str) -> None:
    conditioning = Conditioning(MAKERS[family]())
    factor = int(conditioning.pipe.vae_scale_factor)
    size = (16 * factor, 16 * factor) if family != "sana" else (128, 128)
    both = conditioning.encode(["a cat", "a dog"], size)
    rows = conditioning.cut(both, size)
    one = conditioning.encode(["a dog"], size)
    latents = tiny.latents(2, size=size[0] // factor)
    timesteps = torch.tensor([500, 100])
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
    latents = tiny.latents(3, size=4 if family == "sana" else 16)
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
    assert {m.partition(".")[0] for m in read.updates} == set(trainer.parts.models)
    if text:
        assert len(trainer.parts.models) == 3


def test_what_cannot_be_trained_yet() -> None:
    with pytest.raises(CmloraError, match="Flux2Transformer2DModel cannot be trained yet"):
        Conditioning(families.flux2().pipe)
    with pytest.raises(CmloraError, match="StableDiffusionPipeline cannot be trained: with a"):
        Conditioning(families.sd15().pipe).encode(["a"], (32, 32))


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
