"""LoRAs made of random factors, small enough to be checked densely."""

from __future__ import annotations

from dataclasses import replace

import torch

from cmlora.lora import LoRA, Update

MODULES = (
    "unet.down_blocks.0.attentions.0.to_q",
    "unet.down_blocks.1.attentions.0.to_q",
    "unet.mid_block.attentions.0.to_q",
    "unet.up_blocks.0.attentions.0.to_q",
    "unet.up_blocks.1.attentions.0.to_q",
)


def lora(
    name: str,
    seed: int,
    modules: tuple[str, ...] = MODULES,
    shape: tuple[int, ...] = (12, 10),
    rank: int = 3,
    triggers: tuple[str, ...] = (),
) -> LoRA:
    """A random LoRA, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    updates = {
        module: Update(
            torch.randn((rank, *shape[1:]), generator=generator),
            torch.randn((shape[0], rank), generator=generator),
            scale=0.5,
        )
        for module in modules
    }
    return LoRA(name, updates, triggers=triggers)


def scaled(one: LoRA, name: str, factor: float) -> LoRA:
    """The same LoRA, so many times as strong."""
    updates = {m: replace(u, scale=u.scale * factor) for m, u in one.updates.items()}
    return replace(one, name=name, updates=updates)


def orthogonal(one: LoRA, name: str) -> LoRA:
    """A LoRA of the same norms that writes to and reads from other directions entirely."""
    updates = {}
    for module, update in one.updates.items():
        up, down = update.factors()
        full_out = torch.linalg.qr(up, mode="complete")[0][:, update.rank :][:, : update.rank]
        full_in = torch.linalg.qr(down.T, mode="complete")[0][:, update.rank :][:, : update.rank]
        size = update.norm() / update.rank**0.5
        updates[module] = Update(full_in.T.contiguous(), size * full_out)
    return replace(one, name=name, updates=updates)
