"""Train any part of the embedded world: `python -m cmlora.emoji.train PART`.

Every training keeps checkpoints in the work folder (`$CMLORA_EMOJI_WORK`, by default
`~/.cache/cmlora/emoji`) and continues where it stopped. `install` copies finished parts to the
package's `weights/` folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from cmlora.emoji import autoencoder, base, concepts, judges
from cmlora.emoji.paths import WEIGHTS, work_folder
from cmlora.emoji.schedule import scheduler
from cmlora.emoji.weights import LORAS, Series

STEPS = {"base": 12_000, "vae": 2_500, "probe": 3_000, "clip": 2_000, "lora": concepts.STEPS}
"""Default length of each training, in optimizer steps."""


def model() -> StableDiffusionPipeline:
    """The base model put together from its trained parts."""
    folder = work_folder()
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "base" / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder / "base" / "unet"),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def install() -> None:
    """Copy everything that has been trained into the package."""
    folder = work_folder()
    if (folder / "vae").is_dir() and (folder / "base").is_dir():
        model().to(torch.float16).save_pretrained(WEIGHTS / "model")
        for file in (WEIGHTS / "model").glob("*/config.json"):  # diffusers notes where parts were
            table = json.loads(file.read_text())
            table.pop("_name_or_path", None)
            file.write_text(json.dumps(table, indent=2) + "\n")
    for name in ("loras", "loras_unbiased", "clip"):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, WEIGHTS / name, dirs_exist_ok=True)
    if (folder / "probe.safetensors").is_file():
        WEIGHTS.mkdir(exist_ok=True)
        shutil.copy(folder / "probe.safetensors", WEIGHTS)


def lora(names: Sequence[str], series: Series, steps: int) -> None:
    """Train LoRAs that are not there yet."""
    destination = work_folder() / ("loras" if series == "biased" else "loras_unbiased")
    for name in names:
        if not (destination / f"{name}.safetensors").is_file():
            concepts.train(name, series, destination, steps=steps)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one training, or all of them in order."""
    parser = argparse.ArgumentParser(
        prog="python -m cmlora.emoji.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m cmlora.emoji.train lora character_1 --series unbiased",
    )
    parser.add_argument("part", choices=["base", "vae", "clip", "probe", "lora", "install", "all"])
    parser.add_argument("names", nargs="*", help="with lora: ids; none means all eleven")
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default {STEPS})")
    parser.add_argument("--series", choices=get_args(Series), default="biased")
    chosen = parser.parse_args(arguments)
    unknown = [n for n in chosen.names if n not in LORAS]
    if unknown or (chosen.names and chosen.part != "lora"):
        parser.error(f"unknown argument {(unknown or chosen.names)[0]}; ids: {', '.join(LORAS)}")
    if chosen.steps is not None and chosen.steps < 1:
        parser.error(f"--steps must be at least 1, not {chosen.steps}")
    trainings: dict[str, Callable[[int], Path]] = {
        "base": base.train,
        "vae": autoencoder.train,
        "probe": judges.train_probe,
        "clip": judges.train_clip,
    }
    for part in trainings if chosen.part == "all" else [chosen.part]:
        if part in trainings:
            trainings[part](chosen.steps or STEPS[part])
    if chosen.part == "lora":
        lora(chosen.names or LORAS, chosen.series, chosen.steps or STEPS["lora"])
    if chosen.part == "all":
        for series in get_args(Series):
            lora(LORAS, series, chosen.steps or STEPS["lora"])
    if chosen.part in ("install", "all"):
        install()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
