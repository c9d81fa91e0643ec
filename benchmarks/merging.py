"""How long merging LoRAs takes beside PEFT's ``add_weighted_adapter``, on the same factors.

The model is a UNet of Stable Diffusion 1.5's size whose own weights are never touched.

    python benchmarks/merging.py --loras 5 --rank 32
    python benchmarks/merging.py --scale 8 --rank 4        # a small one, to see that it runs
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import nn

from cmlora.adapters.merging import merge
from cmlora.lora import LoRA, Update

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "ff.net.0.proj", "ff.net.2")
KINDS = {
    "cat": ("cat", {}, {}),
    "svd": ("svd", {}, {}),
    "ties_svd": ("ties", {"density": 0.5}, {"density": 0.5}),
    "magnitude_prune_svd": ("magnitude", {"density": 0.5}, {"density": 0.5}),
    "dare_linear_svd": ("dare_linear", {"density": 0.5}, {"density": 0.5}),
}


def model(scale: int, loras: int, rank: int) -> Any:
    """A PEFT model with random adapters ``l0``, ``l1``, ..."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=tuple(width // scale for width in (320, 640, 1280, 1280)),
            cross_attention_dim=768 // scale,
            attention_head_dim=8,
            norm_num_groups=32 // min(scale, 8),
        )
    unet.to_empty(device="cpu")  # PEFT puts the merged adapter where the model is
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS))
    found: Any = get_peft_model(unet, config, adapter_name="l0")
    for index in range(1, loras):
        found.add_adapter(f"l{index}", config)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in found.named_parameters():
        if ".lora_" in key:
            name, _, last = key.rpartition(".")
            layer = found.get_submodule(name)
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            setattr(layer, last, nn.Parameter(noise))
    return found


def files(peft: Any, loras: int) -> list[LoRA]:
    """The adapters as ours; the tensors are shared."""
    found = []
    for index in range(loras):
        name = f"l{index}"
        updates = {}
        for module, layer in peft.base_model.model.named_modules():
            if name in getattr(layer, "lora_A", ()):
                down, up = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
                updates[f"unet.{module}"] = Update(down, up.flatten(1), layer.scaling[name])
        found.append(LoRA(name, updates))
    return found


def seconds(action: Callable[[], Any], repeats: int) -> float:
    """The fastest of some runs."""
    rounds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        rounds.append(time.perf_counter() - started)
    return min(rounds)


def main() -> None:
    """Print one line per way of merging."""
    parser = argparse.ArgumentParser(description="merging beside PEFT")
    parser.add_argument("--loras", type=int, default=5)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--scale", type=int, default=1, help="divides all widths: 1, 2, 4 or 8")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    peft = model(options.scale, options.loras, options.rank)
    loras = files(peft, options.loras)
    weights = [1 / options.loras] * options.loras
    names = [lora.name for lora in loras]
    print(f"{len(loras[0].updates)} modules, {torch.get_num_threads()} threads")
    print("PEFT's name           PEFT       ours    ratio")
    for kind in options.kinds:
        method, theirs, ours = KINDS[kind]
        rank = None if kind == "cat" else options.rank
        extra = {} if rank is None else {"svd_rank": rank, "svd_full_matrices": False}

        def one(kind: str = kind, given: dict[str, Any] = {**theirs, **extra}) -> None:  # noqa: B006
            peft.add_weighted_adapter(names, weights, "merged", combination_type=kind, **given)
            peft.delete_adapter("merged")

        def other(method: str = method, rank: int | None = rank, given: Any = ours) -> None:
            merge(loras, weights, method, rank=rank, **given)

        slow, fast = seconds(one, options.repeats), seconds(other, options.repeats)
        print(f"{kind:19s} {slow:7.2f} s {fast:8.2f} s {slow / fast:7.1f}x")


if __name__ == "__main__":
    main()
