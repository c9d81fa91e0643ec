"""Tiny models and LoRAs as files, as a user has them."""

import zlib
from functools import cache
from pathlib import Path

import torch

from cmlora.files import write
from cmlora.lora import LoRA, Update
from tests import tiny

RANK = 2


@cache
def _shapes() -> dict[str, tuple[int, int]]:
    """Every attention projection of the tiny UNet: (out features, in features)."""
    linear = (m for m in tiny.sd15().unet.named_modules() if isinstance(m[1], torch.nn.Linear))
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in linear
        if name.endswith((".to_q", ".to_v", ".to_out.0"))
    }


def save_model(folder: Path) -> Path:
    """The tiny Stable Diffusion 1.5 pipeline as a diffusers folder."""
    tiny.sd15().save_pretrained(folder)
    return folder


def save_lora(folder: Path, name: str, *, strength: float = 0.3, wide: int = 1) -> Path:
    """A random LoRA for the tiny UNet, the same for the same name.

    Args:
        folder: where the file goes.
        name: its stem; also the seed.
        strength: standard deviation of the factors.
        wide: factor on every width; more than 1 makes it a LoRA for another base.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    updates = {
        f"unet.{module}": Update(
            strength * torch.randn((RANK, wide * inputs), generator=generator),
            strength * torch.randn((wide * outputs, RANK), generator=generator),
        )
        for module, (outputs, inputs) in _shapes().items()
    }
    path = folder / f"{name}.safetensors"
    write(LoRA(name, updates, triggers=(f"the {name}",)), path)
    return path
