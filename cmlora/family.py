"""Which family of base models a LoRA or a pipeline belongs to, in words a person recognises."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cmlora.lora import LoRA

_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}

UNKNOWN = "an unknown family"
"""Of a file that says nothing of its model."""
TRANSFORMER = "a diffusion transformer"
"""Any of several."""
UNETS = tuple(_WIDTHS.values())
"""Families whose denoiser is a UNet."""

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


_TABLES = {
    "aura_flow": "AuraFlow",
    "chroma": "Chroma",
    "flux": "FLUX",
    "flux2": "FLUX.2",
    "hunyuan": "HunyuanVideo",
    "ltx": "LTX-Video",
    "lumina2": "Lumina 2",
    "sd3": "Stable Diffusion 3",
    "wan": "Wan",
    "z_image": "Z-Image",
}

_MODULES = (
    (r"single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj", "FLUX.2"),
    (r"single_transformer_blocks\.", "FLUX"),
    (r"^blocks\.\d+\.(attn[12]|ffn)\.", "Wan"),
    (r"^(layers|noise_refiner|context_refiner)\.\d+\.attention\.to_", "Z-Image"),
    (r"transformer_blocks\.\d+\.(img|txt)_(mlp|mod)\.", "Qwen-Image"),
    (r"^(double|single)_stream_blocks\.\d+\.block\.", "HiDream"),
    (r"transformer_blocks\.\d+\.attn2\.to_q", "Stable Diffusion 3 or a cross-attention model"),
)


def of_lora(lora: LoRA, table: str | None = None, widths: Mapping[str, int] | None = None) -> str:
    """The family a LoRA was trained for: by its shapes, otherwise by its names and metadata.

    Args:
        lora: its updates.
        table: whose original names its file has, see `cmlora.originals.family`.
        widths: inputs of further layers that the file changes, by module.
    """
    known = {module: update.shape[1] for module, update in lora.updates.items()}
    known = {**(widths or {}), **known}
    for module, width in known.items():
        if module.startswith("unet.") and module.endswith(("attn2.to_k", "attn2.to_v")) and width:
            return _by_width(width)
    if table is not None:
        return _TABLES[table]
    said = " ".join(
        lora.metadata.get(key, "")
        for key in ("modelspec.architecture", "ss_base_model_version", "cmlora.base")
    ).lower()
    parts = {module.partition(".")[0] for module in known}
    names = [m.partition(".")[2] for m in known if m.startswith("transformer")]
    for pattern, family in _MODULES:
        if any(re.search(pattern, name) for name in names):
            return family
    for mark, name in _NAMES:
        if mark in said:
            return name
    if "unet" in parts and "text_encoder_2" in parts:
        return _WIDTHS[2048]
    dit = parts & {"transformer", "transformer_2"}
    return TRANSFORMER if dit else UNKNOWN


def of_pipe(pipe: Any) -> str:
    """The family of a pipeline: by the width of text its UNet takes, or its transformer's class."""
    unet = getattr(pipe, "unet", None)
    if unet is None:
        transformer = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
        return UNKNOWN if transformer is None else type(transformer).__name__
    width = unet.config.cross_attention_dim
    return _by_width(width if isinstance(width, int) else next(iter(width)))


def _by_width(width: int) -> str:
    return _WIDTHS.get(width, f"a UNet for text of width {width}")
