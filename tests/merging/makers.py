"""Random LoRAs of small shapes, and the same LoRAs written differently."""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cmlora.adapters.merging import MERGES, merge
from cmlora.adapters.merging.factors import Pair
from cmlora.adapters.merging.result import MergeResult
from cmlora.lora import LoRA, Update

SHAPES: Mapping[str, tuple[int, ...]] = {
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": (12, 14),
    "unet.down_blocks.0.attentions.0.proj_in": (14, 13, 1, 1),
    "unet.down_blocks.0.resnets.0.conv1": (16, 5, 3, 3),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (13, 15),
    "transformer.transformer_blocks.0.attn.to_k": (15, 12),
}


def make(name: str, rank: int = 3, scale: float = 0.5, dtype: torch.dtype = torch.float32) -> LoRA:
    """A random LoRA over `SHAPES`, the same for the same name and rank."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}{rank}".encode()))
    updates = {
        module: Update(
            torch.randn((rank, *shape[1:]), generator=generator).to(dtype),
            torch.randn((shape[0], rank), generator=generator).to(dtype),
            scale,
        )
        for module, shape in SHAPES.items()
    }
    return LoRA(name, updates, triggers=(name,))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_pair(seed: int, rows: int = 11, columns: int = 13, rank: int = 3) -> Pair:
    """A random matrix in double precision."""
    g = generator(seed)
    up = torch.randn((rows, rank), generator=g, dtype=torch.double)
    return Pair(up, torch.randn((rank, columns), generator=g, dtype=torch.double))


def product(pair: Pair) -> Tensor:
    return pair.up @ pair.down


def permuted(lora: LoRA) -> LoRA:
    """The same LoRA with its rank units in reverse order."""
    updates = {
        module: replace(update, down=update.down.flip(0), up=update.up.flip(1))
        for module, update in lora.updates.items()
    }
    return replace(lora, updates=updates)


def regauged(lora: LoRA, seed: int = 0) -> LoRA:
    """The same LoRA through other factors: up M and M^-1 down, with some signs turned."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for module, update in lora.updates.items():
        up, down = update.factors()
        rank = update.rank
        turn = torch.linalg.qr(torch.randn((rank, rank), generator=generator).double()).Q
        mix = turn * torch.linspace(-0.7, 1.9, rank + 3).double()[3:]
        down = (torch.linalg.inv(mix) @ down).reshape(rank, *update.shape[1:])
        updates[module] = Update(down, up @ mix)
    return replace(lora, updates=updates)


def named(lora: LoRA, name: str) -> LoRA:
    return replace(lora, name=name)


def without(lora: LoRA, module: str) -> LoRA:
    return replace(lora, updates={m: u for m, u in lora.updates.items() if m != module})


def zeroed(lora: LoRA, module: str) -> LoRA:
    update = lora.updates[module]
    changed = {module: replace(update, up=torch.zeros_like(update.up))}
    return replace(lora, updates={**lora.updates, **changed})


def distance(one: LoRA, other: LoRA) -> float:
    """Largest relative distance of two LoRAs over the modules."""
    worst = 0.0
    for module in one.updates.keys() | other.updates.keys():
        present = [
            lora.updates[module].delta().double() for lora in (one, other) if module in lora.updates
        ]
        deltas = [delta.flatten(1) for delta in present]
        gap = deltas[0] - deltas[1] if len(deltas) == 2 else deltas[0]
        size = max(float(delta.norm()) for delta in deltas)
        worst = max(worst, float(gap.norm()) / size if size else 0.0)
    return worst


def inputs(name: str, module: str, width: int) -> Tensor:
    """Random inputs (2 * width, width) of a module while a LoRA is active."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{module}".encode()))
    return torch.randn((2 * width, width), generator=generator, dtype=torch.double)


def grams(loras: Sequence[LoRA]) -> dict[str, dict[str, Tensor]]:
    """Second moments of these inputs for every LoRA and any module of one of them."""
    shapes = {m: u.shape for lora in loras for m, u in lora.updates.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for lora in loras:
        for module, shape in shapes.items():
            rows = inputs(lora.name, module, math.prod(shape[1:]))
            found.setdefault(lora.name, {})[module] = rows.T @ rows
    return found


def do(
    method: str, loras: Sequence[LoRA], weights: Sequence[float] | None = None, **options: Any
) -> MergeResult:
    """Merge with calibration data if the method needs it."""
    if MERGES[method].object.needs_grams:
        options["grams"] = grams(loras)
    return merge(loras, weights or [1.0] * len(loras), method, **options)


def rank_stabilised(lora: LoRA, folder: Path, alpha: float = 6.0) -> Path:
    """A PEFT file with the LoRA's factors and rsLoRA's scale alpha / sqrt(rank)."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for module, update in lora.updates.items():
        tensors[f"{module}.lora_A.weight"] = update.down
        tensors[f"{module}.lora_B.weight"] = update.up.reshape(
            *update.up.shape, *[1] * (update.down.ndim - 2)
        )
        part = {"r": update.rank, "lora_alpha": alpha, "use_rslora": True}
        settings |= {f"{module.partition('.')[0]}.{key}": value for key, value in part.items()}
    path = folder / f"{lora.name}.safetensors"
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    return path
