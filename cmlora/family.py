"""Which family of base models a LoRA or a pipeline belongs to, in words a person recognises."""

from __future__ import annotations

from typing import Any

from cmlora.lora import LoRA

_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}

_NAMES = (
    ("sdxl", "Stable Diffusion XL"),
    ("stable-diffusion-xl", "Stable Diffusion XL"),
    ("sd_v1", "Stable Diffusion 1.x"),
    ("stable-diffusion-v1", "Stable Diffusion 1.x"),
    ("sd_v2", "Stable Diffusion 2.x"),
    ("stable-diffusion-v2", "Stable Diffusion 2.x"),
    ("stable-diffusion-3", "Stable Diffusion 3"),
    ("flux", "FLUX"),
)


def of_lora(lora: LoRA) -> str:
    """The family a LoRA was trained for: by its shapes, otherwise by its names and metadata."""
    for module, update in lora.updates.items():
        if module.startswith("unet.") and module.endswith(("attn2.to_k", "attn2.to_v")):
            return _by_width(update.shape[1])
    said = " ".join(
        lora.metadata.get(key, "")
        for key in ("modelspec.architecture", "ss_base_model_version", "cmlora.base")
    ).lower()
    parts = lora.parts
    if any(name.startswith("single_transformer_blocks") for name in parts.get("transformer", {})):
        return "FLUX"
    for mark, name in _NAMES:
        if mark in said:
            return name
    if "unet" in parts and "text_encoder_2" in parts:
        return _WIDTHS[2048]
    return "a diffusion transformer" if "transformer" in parts else "an unknown family"


def of_pipe(pipe: Any) -> str:
    """The family of a pipeline: by the width of text its UNet takes, or its transformer's class."""
    unet = getattr(pipe, "unet", None)
    if unet is None:
        transformer = getattr(pipe, "transformer", None)
        return "an unknown family" if transformer is None else type(transformer).__name__
    width = unet.config.cross_attention_dim
    return _by_width(width if isinstance(width, int) else next(iter(width)))


def _by_width(width: int) -> str:
    return _WIDTHS.get(width, f"a UNet for text of width {width}")
