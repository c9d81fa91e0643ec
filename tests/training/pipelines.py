"""A tiny pipeline of every family that can be trained, with tokenizers and text encoders."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
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

from tests import families, tiny
from tests.training import bench


def t5(layers: int = 1) -> T5EncoderModel:
    """A text encoder of 16 channels without a limit of tokens."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=32, num_layers=layers, num_heads=2)
    return T5EncoderModel(config).eval()


def sd3() -> Any:
    """Stable Diffusion 3 with both CLIPs."""
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
    """FLUX.1 dev."""
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
    """PixArt alpha."""
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
    """Sana, without an autoencoder."""
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


def chatting(template: str) -> Any:
    """A tokenizer that puts a prompt into a conversation first, of 24 tokens at most."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    original = tokenizer.apply_chat_template

    def short(messages: Any, **options: Any) -> Any:
        return original(messages, **options | {"max_length": 24})

    tokenizer.apply_chat_template = short
    return tokenizer


def flux2() -> Any:
    """FLUX.2: three layers of the text encoder, and an autoencoder with a mean for each place."""
    pipe = families.flux2().pipe
    torch.manual_seed(0)
    options = {**pipe.transformer.config, "joint_attention_dim": 3 * 16}
    options |= {"num_layers": 1, "num_single_layers": 1}
    model = type(pipe.transformer).from_config(options).eval()
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return type(pipe)(
        scheduler=pipe.scheduler,
        vae=vae,
        text_encoder=t5(30),
        tokenizer=chatting("{{ messages[1]['content'][0]['text'] }}"),
        transformer=model,
    )


def moments() -> dict[str, Any]:
    """Statistics of four channels, and the smallest autoencoder of videos."""
    return {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "latents_mean": [0.5, -0.2, 0.1, 0.8],
        "latents_std": [1.5, 0.7, 2.0, 0.9],
    }


def qwen() -> Any:
    """Qwen-Image: captions keep their lengths."""
    pipe = families.qwen().pipe
    torch.manual_seed(0)
    model = type(pipe.transformer).from_config({**pipe.transformer.config, "num_layers": 1}).eval()
    return type(pipe)(
        scheduler=pipe.scheduler,
        vae=AutoencoderKLQwenImage(**moments()).eval(),
        text_encoder=t5(),
        tokenizer=tiny.tokenizer(),
        transformer=model,
    )


def zimage() -> Any:
    """Z-Image: pictures and captions are lists, time runs the other way."""
    pipe = families.zimage().pipe
    vae = tiny.vae()
    vae.register_to_config(shift_factor=0.3)
    return type(pipe)(
        scheduler=pipe.scheduler,
        vae=vae,
        text_encoder=t5(),
        tokenizer=chatting("{{ messages[0]['content'] }}"),
        transformer=pipe.transformer,
    )


def wan() -> Any:
    """Wan 2.2: one denoiser for the noisy half, one for the rest."""
    pipe = families.wan().pipe
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**moments()).eval()
    return type(pipe)(
        tokenizer=tiny.tokenizer(),
        text_encoder=t5(),
        vae=vae,
        scheduler=pipe.scheduler,
        transformer=pipe.transformer,
        transformer_2=pipe.transformer_2,
        boundary_ratio=0.5,
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "sd15": bench.pipeline,
    "sdxl": tiny.sdxl,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "sana": sana,
    "flux2": flux2,
    "qwen": qwen,
    "zimage": zimage,
    "wan": wan,
}
"""How to make each."""
