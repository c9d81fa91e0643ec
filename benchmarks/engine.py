"""What the engine costs over the bare model calls, and against switching with ``set_adapters``.

A UNet of Stable Diffusion 1.5's size, one LoRA per pass, no guidance and no pipeline around it:
the calls that a composition makes, by the engine, by a loop with ``set_adapters``, and bare, with
one LoRA active all the time. Rounds of the three alternate; the fastest of each counts.

    python benchmarks/engine.py --size 256 --loras 3 --rounds 5
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig

from cmlora.compose import compose
from cmlora.switching import AdapterSwitch

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
SCALE = 8
TOKENS = 77


class Loop:
    """A denoiser with a scheduler: all of a pipeline that a composition needs."""

    def __init__(self, channels: tuple[int, ...], loras: int) -> None:
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(cross_attention_dim=768, block_out_channels=channels)
        self.unet.eval().requires_grad_(False)
        self.scheduler = DDIMScheduler()
        self.scheduler.set_timesteps(50)
        self.names = [f"lora{i}" for i in range(loras)]
        for name in self.names:
            config = LoraConfig(r=16, target_modules=list(TARGETS), init_lora_weights=False)
            self.unet.add_adapter(config, adapter_name=name)
        self.unet.requires_grad_(False)


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    """Print the two ratios."""
    parser = argparse.ArgumentParser(description="the engine against bare model calls")
    parser.add_argument("--size", type=int, default=256, help="of the picture, in pixels")
    parser.add_argument("--loras", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--channels", type=int, nargs=4, default=[320, 640, 1280, 1280])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    loop = Loop(tuple(options.channels), options.loras)
    side = options.size // SCALE
    call = {
        "sample": torch.randn(1, 4, side, side),
        "encoder_hidden_states": torch.randn(1, TOKENS, 768),
        "return_dict": False,
    }
    steps = iter(loop.scheduler.timesteps)

    def bare() -> None:
        timestep = loop.scheduler.timesteps[0]
        for _ in loop.names:
            loop.unet(timestep=timestep, **call)

    def plainly() -> None:
        timestep = loop.scheduler.timesteps[0]
        for name in loop.names:
            loop.unet.set_adapters([name], [1.0])
            loop.unet(timestep=timestep, **call)

    def composed() -> None:
        loop.unet(timestep=next(steps), **call)

    times: dict[str, list[float]] = {"bare": [], "set_adapters": [], "engine": []}
    with torch.no_grad():
        for _ in range(options.rounds + 1):
            AdapterSwitch(loop.unet).activate({loop.names[0]: 1.0})
            times["bare"].append(seconds(bare))
            times["set_adapters"].append(seconds(plainly))
            with compose(loop, loop.names, method="composite"):
                composed()  # the first call of a run does more
                times["engine"].append(seconds(composed))
    best = {name: min(values[1:]) for name, values in times.items()}
    print(f"{options.loras} LoRAs, {options.size}x{options.size}, seconds per denoising step")
    for name, value in best.items():
        print(f"{name:14s}{value:9.4f}  {value / best['bare']:6.3f}x")
    overhead = best["engine"] / best["bare"] - 1
    print(f"the engine adds {overhead:.1%} to the bare calls")


if __name__ == "__main__":
    main()
