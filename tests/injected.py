"""Random LoRAs in models of any family, also of those for which diffusers has no loader."""

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.utils import set_weights_and_activate_adapters
from peft import LoraConfig, inject_adapter_in_model


def add_loras(models: Iterable[Any], names: Iterable[str], targets: Iterable[str]) -> None:
    """Random LoRAs that depend on their name only, on every model."""
    models, targets = list(models), list(targets)
    for name in names:
        for model in models:
            config = LoraConfig(r=2, lora_alpha=3, target_modules=targets)
            if hasattr(model, "add_adapter"):
                model.add_adapter(config, adapter_name=name)
            else:
                inject_adapter_in_model(config, model, adapter_name=name)
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            for key, parameter in model.named_parameters():
                if f".{name}." in key:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.data.copy_(0.3 * noise)
            model.requires_grad_(False)


def activate(model: Any, name: str, weight: float = 1.0) -> None:
    """One LoRA in one model, as diffusers does it."""
    set_weights_and_activate_adapters(model, [name], [weight])
