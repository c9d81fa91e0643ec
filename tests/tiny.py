"""Tiny real models, built in code from fixed seeds: a few thousand weights, no download.

They have the block types and call conventions of the real ones (Stable Diffusion 1.5 and XL), and
with `WHOLE` their whole module tree, for everything that depends on names.
"""

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

TARGETS: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv2")
"""What `add_loras` adapts in a UNet: attention everywhere, and the ResNets' convolutions."""

TEXT_TARGETS: tuple[str, ...] = ("q_proj", "v_proj", "fc1")
"""What `add_loras` adapts in a text encoder."""

WHOLE: dict[str, Any] = {"layers_per_block": 2, "levels": 4}
"""Arguments of `sd15` and `sdxl` for as many blocks and layers as the real ones have."""

_WIDTH = 16


def unet_sd15(
    *,
    layers_per_block: int = 2,
    channels: Sequence[int] = (8, 16, 16, 16),
    latent_channels: int = 4,
    attention_first: bool = True,
    seed: int = 0,
) -> UNet2DConditionModel:
    """A UNet with the blocks of Stable Diffusion 1.5: attention everywhere but at the bottom.

    Args:
        layers_per_block: ResNet and attention pairs per block.
        channels: one width per level.
        latent_channels: channels going in and out.
        attention_first: whether the outermost level has attention.
        seed: of the weights.
    """
    levels = len(channels)
    attends = [attention_first, *[True] * (levels - 2), False]
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        block_out_channels=tuple(channels),
        layers_per_block=layers_per_block,
        norm_num_groups=4,
        cross_attention_dim=_WIDTH,
        attention_head_dim=2,
    ).eval()


def unet_sdxl(*, layers_per_block: int = 2, seed: int = 0) -> UNet2DConditionModel:
    """A UNet with the blocks of Stable Diffusion XL: no attention at the outermost level.

    Args:
        layers_per_block: ResNets per block, and transformer layers of the innermost ones.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16, 16),
        layers_per_block=layers_per_block,
        transformer_layers_per_block=(1, 1, layers_per_block),
        norm_num_groups=4,
        attention_head_dim=(1, 2, 2),
        cross_attention_dim=2 * _WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + _WIDTH,
    ).eval()


def tokenizer() -> CLIPTokenizer:
    """One token per letter or digit, 16 tokens per prompt."""
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for character in "abcdefghijklmnopqrstuvwxyz0123456789,.-":
        vocabulary[character] = len(vocabulary)
        vocabulary[f"{character}</w>"] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def text_encoder(*, projection: bool = False, seed: int = 0) -> Any:
    """A CLIP text encoder of two layers; with ``projection`` the second one of SDXL."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=128,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=_WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = CLIPTextModelWithProjection if projection else CLIPTextModel
    return model(config).eval()


def vae(*, latent_channels: int = 4, seed: int = 0) -> AutoencoderKL:
    """An autoencoder that halves the sides of a picture."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=32,
    ).eval()


def scheduler() -> DDIMScheduler:
    """DDIM with Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def sd15(
    *, layers_per_block: int = 1, levels: int = 3, seed: int = 0, **unet: Any
) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.5 pipeline making 32x32 pictures.

    Args:
        layers_per_block: see `unet_sd15`.
        levels: how many resolutions its UNet has; `WHOLE` has as many as the real one.
        seed: of all weights.
        unet: further arguments of `unet_sd15`.
    """
    latent_channels = unet.get("latent_channels", 4)
    unet.setdefault("channels", (8, *[16] * (levels - 1)))
    pipe = StableDiffusionPipeline(
        vae=vae(latent_channels=latent_channels, seed=seed),
        text_encoder=text_encoder(seed=seed),
        tokenizer=tokenizer(),
        unet=unet_sd15(seed=seed, layers_per_block=layers_per_block, **unet),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl(*, layers_per_block: int = 1, levels: int = 3, seed: int = 0) -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL pipeline making 32x32 pictures.

    Args:
        layers_per_block: see `unet_sdxl`.
        levels: of no effect; the real one has three as well.
        seed: of all weights.
    """
    pipe = StableDiffusionXLPipeline(
        vae=vae(seed=seed),
        text_encoder=text_encoder(seed=seed),
        text_encoder_2=text_encoder(projection=True, seed=seed + 1),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet_sdxl(layers_per_block=layers_per_block, seed=seed),
        scheduler=scheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_loras(
    pipe: Any, names: Iterable[str], *, rank: int = 4, seed: int = 0, text: bool = False
) -> None:
    """Give a pipeline random LoRAs that visibly change its output.

    The weights depend on ``seed`` and on the LoRA's name only, not on the order of loading.
    Afterwards the LoRA that was added last is the active one, as after `load_lora_weights`.

    Args:
        pipe: a pipeline with a ``unet``.
        names: adapter names.
        rank: of every update; alpha is 3, so that the scale is not 1.
        seed: of the weights.
        text: adapt the text encoders too.
    """
    parts = [(pipe.unet, TARGETS)]
    if text:
        encoders = ("text_encoder", "text_encoder_2")
        parts += [(getattr(pipe, n), TEXT_TARGETS) for n in encoders if hasattr(pipe, n)]
    for name in names:
        for model, targets in parts:
            adapt(model, [name], targets, rank=rank, seed=seed)


def adapt(
    model: Any, names: Iterable[str], targets: Iterable[str], *, rank: int = 4, seed: int = 0
) -> None:
    """The same for one model.

    Args:
        model: with diffusers' or transformers' ``add_adapter``.
        names: adapter names.
        targets: endings of the names of the layers to adapt.
        rank: of every update.
        seed: of the weights.
    """
    for name in names:
        config = LoraConfig(r=rank, lora_alpha=3, target_modules=list(targets))
        model.add_adapter(config, adapter_name=name)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(0.2 * noise)


def latents(batch: int = 1, *, channels: int = 4, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Initial noise (B, C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, channels, size, size), generator=generator)


def run(pipe: Any, *, steps: int = 4, seed: int = 0, **options: Any) -> torch.Tensor:
    """One run of a pipeline from a seed: the final latents (B, C, H, W).

    Args:
        pipe: the pipeline.
        steps: denoising steps.
        seed: of the initial noise.
        options: further arguments of the pipeline's call.
    """
    arguments: dict[str, Any] = {
        "prompt": "a cat",
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "height": 32,
        "width": 32,
    }
    result: torch.Tensor = pipe(**arguments | options).images
    return result
