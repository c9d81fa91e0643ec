"""Pictures as latents: what the denoiser of a pipeline takes, as maps (C, H, W)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


def factor(pipe: Any) -> int:
    """Pixels per latent on each side."""
    names = ("vae_scale_factor", "vae_scale_factor_spatial")
    return int(next((getattr(pipe, name) for name in names if hasattr(pipe, name)), 8))


@torch.no_grad()
def encoded(vae: Any, pixels: Tensor) -> Tensor:
    """Latents (B, C, H, W) on the CPU, of the mean and spread that the denoiser was trained on.

    Args:
        vae: an autoencoder of diffusers; one of videos gets the pictures as videos of one frame.
        pixels: (B, 3, H, W), -1 to 1.
    """
    weight, config = next(vae.parameters()), vae.config
    video = "temperal_downsample" in config  # the spelling of the autoencoders of Wan and Qwen
    given = pixels.to(weight.device, weight.dtype)
    answer = vae.encode(given[:, :, None] if video else given)
    found = answer.latent_dist.mode() if hasattr(answer, "latent_dist") else answer.latent
    latents: Tensor = (found[:, :, 0] if video else found).float()
    if hasattr(vae, "bn"):  # FLUX.2: a mean and a spread for each place in patches of two by two
        patches = pixel_unshuffle(latents, 2)
        mean, spread = vae.bn.running_mean, vae.bn.running_var + config.batch_norm_eps
        patches = (patches - _channels(mean, patches)) / _channels(spread, patches).sqrt()
        return pixel_shuffle(patches, 2).cpu()
    scale = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None:
        mean, spread = (torch.tensor(config[f"latents_{name}"]) for name in ("mean", "std"))
        latents = (latents - _channels(mean, latents)) / _channels(spread, latents)
        return (latents * scale).cpu()
    return ((latents - (config.get("shift_factor") or 0.0)) * scale).cpu()


def _channels(values: Tensor, like: Tensor) -> Tensor:
    return values.flatten().to(like)[None, :, None, None]
