"""A tiny pipeline of every family, with random weights, real module trees and no text encoder.

Prompts are given as embeddings, so that no tokenizer has to be made.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from tests import tiny
from tests.injected import activate as activate
from tests.injected import add_loras as add_loras

NAMES = ("ink", "alice")
TARGETS = ("to_q", "to_v", "to_out.0", "to_qkv_mlp_proj", "conv1")
WIDTH = 16
TOKENS = 5


@dataclass
class Family:
    """A pipeline with the arguments of its call.

    Args:
        pipe: the pipeline.
        denoisers: names of its denoisers.
        call: what it is called with besides steps and seed.
    """

    pipe: Any
    denoisers: tuple[str, ...] = ("transformer",)
    call: dict[str, Any] = field(default_factory=dict)

    def run(self, *, steps: int = 4, seed: int = 0, **options: Any) -> torch.Tensor:
        """The final latents of one run."""
        arguments: dict[str, Any] = {
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
            **self.call,
        }
        output = self.pipe(**arguments | options)
        result: torch.Tensor = output.frames if hasattr(output, "frames") else output.images
        return result

    def models(self) -> list[Any]:
        """The denoisers."""
        return [getattr(self.pipe, name) for name in self.denoisers]


def embedding(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers that stand for a prompt."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


def set_timesteps(scheduler: Any, steps: int) -> None:
    """A new table of timesteps, as a pipeline makes it."""
    shifts = scheduler.config.get("use_dynamic_shifting")
    scheduler.set_timesteps(steps, **({"mu": 0.5} if shifts else {}))


def _flow(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **options})


def _pair() -> dict[str, Any]:
    """Embeddings of a prompt and of a negative prompt."""
    return {
        "prompt_embeds": embedding(1, TOKENS, WIDTH),
        "negative_prompt_embeds": embedding(1, TOKENS, WIDTH, seed=1),
    }


def _pooled() -> dict[str, Any]:
    return {
        **_pair(),
        "pooled_prompt_embeds": embedding(1, WIDTH, seed=2),
        "negative_pooled_prompt_embeds": embedding(1, WIDTH, seed=3),
    }


def sd15() -> Family:
    """Stable Diffusion 1.5."""
    pipe = StableDiffusionPipeline(
        vae=tiny.vae(),
        text_encoder=None,
        tokenizer=None,
        unet=tiny.unet_sd15(channels=(8, 16), layers_per_block=1),
        scheduler=tiny.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return Family(pipe, ("unet",), {**_pair(), "height": 32, "width": 32, "guidance_scale": 4.0})


def sd2() -> Family:
    """Stable Diffusion 2: linear projections around attention, velocity prediction."""
    family = sd15()
    unet = family.pipe.unet
    config = {**unet.config, "use_linear_projection": True, "attention_head_dim": (2, 4)}
    torch.manual_seed(0)
    family.pipe.unet = type(unet).from_config(config).eval()
    config = {**family.pipe.scheduler.config, "prediction_type": "v_prediction"}
    family.pipe.scheduler = type(family.pipe.scheduler).from_config(config)
    return family


def sdxl() -> Family:
    """Stable Diffusion XL."""
    pipe = StableDiffusionXLPipeline(
        vae=tiny.vae(),
        text_encoder=None,
        text_encoder_2=tiny.text_encoder(projection=True),
        tokenizer=None,
        tokenizer_2=None,
        unet=tiny.unet_sdxl(),
        scheduler=tiny.scheduler(),
        add_watermarker=False,
    )
    call = {name: value.repeat(1, 1, 2) for name, value in _pair().items()}
    pooled = {name: value for name, value in _pooled().items() if "pooled" in name}
    return Family(pipe, ("unet",), {**call, **pooled, "height": 32, "width": 32})


def sd3(channels: int = 4) -> Family:
    """Stable Diffusion 3.

    Args:
        channels: of the latents; 16 in the real one.
    """
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
    ).eval()
    pipe = StableDiffusion3Pipeline(
        transformer=model,
        scheduler=_flow(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return Family(pipe, call={**_pooled(), "height": 64, "width": 64, "guidance_scale": 4.0})


def flux() -> Family:
    """FLUX.1 dev with true guidance: two calls per step."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    pipe = FluxPipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=model,
    )
    return Family(pipe, call={**_pooled(), "height": 64, "width": 64, "true_cfg_scale": 3.0})


def flux_distilled() -> Family:
    """FLUX.1 dev as it is used: guidance is an input, one call per step."""
    family = flux()
    family.call = {n: v for n, v in family.call.items() if not n.startswith("negative")}
    family.call["true_cfg_scale"] = 1.0
    return family


def flux2() -> Family:
    """FLUX.2."""
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
    ).eval()
    pipe = Flux2Pipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=model,
    )
    call = {"prompt_embeds": embedding(1, TOKENS, WIDTH), "height": 64, "width": 64}
    return Family(pipe, call=call)


def qwen() -> Family:
    """Qwen-Image: two calls per step."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    pipe = QwenImagePipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=model,
    )
    masks = {
        "prompt_embeds_mask": torch.ones(1, TOKENS, dtype=torch.long),
        "negative_prompt_embeds_mask": torch.ones(1, TOKENS, dtype=torch.long),
    }
    call = {**_pair(), **masks, "height": 64, "width": 64, "true_cfg_scale": 3.0}
    return Family(pipe, call=call)


def zimage() -> Family:
    """Z-Image: pictures and prompts are lists."""
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    ).eval()
    for name, parameter in model.named_parameters():
        if "pad_token" in name:  # made without a value
            torch.nn.init.normal_(parameter)
    pipe = ZImagePipeline(
        scheduler=_flow(), vae=None, text_encoder=None, tokenizer=None, transformer=model
    )
    call = {name: list(value) for name, value in _pair().items()}
    return Family(pipe, call={**call, "height": 64, "width": 64, "guidance_scale": 3.0})


def sana() -> Family:
    """Sana: a cross-attention transformer with linear attention."""
    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=4,
    ).eval()
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = SanaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=scheduler
    )
    mask = torch.ones(1, TOKENS)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    sizes = {"height": 128, "width": 128, "use_resolution_binning": False}
    guidance = {"negative_prompt": None, "guidance_scale": 3.0}
    return Family(pipe, call={**_pair(), **masks, **sizes, **guidance})


def pixart() -> Family:
    """PixArt Sigma: a cross-attention transformer for which diffusers loads no LoRAs."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=8,
    ).eval()
    pipe = PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=tiny.scheduler()
    )
    mask = torch.ones(1, TOKENS)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    sizes = {"height": 64, "width": 64, "use_resolution_binning": False}
    guidance = {"negative_prompt": None, "guidance_scale": 3.0}
    return Family(pipe, call={**_pair(), **masks, **sizes, **guidance})


def wan() -> Family:
    """Wan 2.2: video, a denoiser for the noisy half of a run and one for the rest."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=WIDTH,
            freq_dim=16,
            ffn_dim=32,
            num_layers=3,
            rope_max_seq_len=32,
        )
        models.append(model.eval())
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
        ),
        transformer=models[0],
        transformer_2=models[1],
        boundary_ratio=0.5,
    )
    call = {**_pair(), "height": 64, "width": 64, "num_frames": 5, "guidance_scale": 3.0}
    return Family(pipe, ("transformer", "transformer_2"), call)


FAMILIES = {
    make.__name__: make
    for make in (sd15, sd2, sdxl, sd3, flux, flux_distilled, flux2, qwen, zimage, pixart, sana, wan)
}
"""How to make each."""


@functools.cache
def family(name: str) -> Family:
    """A family with two LoRAs, made once; tests may change which of them are active."""
    made = FAMILIES[name]()
    made.pipe.set_progress_bar_config(disable=True)
    add_loras(made.models(), NAMES, TARGETS)
    return made
