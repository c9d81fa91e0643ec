"""How much faster LoRAs are switched directly than with diffusers' ``set_adapters``.

The model is a UNet of Stable Diffusion XL's size on the meta device: switching touches no weight.

    python benchmarks/switching.py --loaded 1 5 20
"""

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from cmlora.switching import AdapterSwitch

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut")


def unet() -> UNet2DConditionModel:
    """SDXL's UNet without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def seconds(action: Callable[[str], None], names: list[str], repeats: int) -> float:
    """The fastest of some rounds through the names, per switch."""
    rounds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for name in names:
            action(name)
        rounds.append((time.perf_counter() - started) / len(names))
    return min(rounds)


def main() -> None:
    """Print one line per number of loaded LoRAs."""
    parser = argparse.ArgumentParser(description="set_adapters against AdapterSwitch")
    parser.add_argument("--loaded", type=int, nargs="+", default=[1, 5, 20], metavar="N")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model = unet()
    names: list[str] = []
    print("loaded  set_adapters  direct    ratio")
    for count in sorted(options.loaded):
        while len(names) < count:
            names.append(f"lora{len(names)}")
            config = LoraConfig(r=4, target_modules=list(TARGETS))
            model.add_adapter(config, adapter_name=names[-1])
        switch = AdapterSwitch(model)

        def plainly(name: str) -> None:
            model.set_adapters([name], [0.8])

        def directly(name: str, switch: AdapterSwitch = switch) -> None:
            switch.activate({name: 0.8})

        slow = seconds(plainly, names, options.repeats)
        fast = seconds(directly, names, options.repeats)
        print(f"{count:6d}  {slow * 1e3:9.1f} ms  {fast * 1e3:.2f} ms  {slow / fast:5.0f}x")


if __name__ == "__main__":
    main()
