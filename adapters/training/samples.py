"""Pictures that show how far a training is, and pictures of a class from the model itself."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import torch

from cmlora.adapters.training.pictures import SUFFIXES
from cmlora.adapters.training.settings import Settings
from cmlora.atomic import replacing


def draw(pipe: Any, settings: Settings, folder: Path, step: int) -> list[Path]:
    """Writes one picture per validation prompt, ``step-000100-0.png``; the noise is always the
    same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, prompt in enumerate(settings.validation_prompts):
        path = folder / f"step-{step:06d}-{number}.png"
        _picture(pipe, prompt, settings.seed + number, settings, path)
        written.append(path)
    return written


def draw_prior(pipe: Any, settings: Settings, folder: Path) -> int:
    """Fills a folder up with pictures of the class; returns how many were made."""
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
    made = 0
    for number in range(settings.prior_count):
        path = folder / f"prior-{number:05d}.png"
        if there + made >= settings.prior_count:
            break
        if path.exists():
            continue
        _picture(pipe, settings.prior_prompt, settings.seed + number, settings, path)
        made += 1
    return made


def _picture(pipe: Any, prompt: str, seed: int, settings: Settings, path: Path) -> None:
    scheduler = pipe.scheduler
    pipe.scheduler = copy.deepcopy(scheduler)
    options: dict[str, Any] = {"output_type": "pil"}
    if "num_frames" in inspect.signature(type(pipe).__call__).parameters:
        options["num_frames"] = 1
    try:
        output = pipe(
            prompt,
            num_inference_steps=settings.validation_steps,
            generator=torch.Generator().manual_seed(seed),
            height=settings.resolution,
            width=settings.resolution,
            **options,
        )
        image = output.images[0] if hasattr(output, "images") else output.frames[0][0]
    finally:
        pipe.scheduler = scheduler
    with replacing(path) as file:
        image.save(file, "PNG")
