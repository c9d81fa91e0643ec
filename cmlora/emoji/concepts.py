"""Train the eleven concept LoRAs with the package's trainer, from a few dozen pictures each.

Two series. `biased` is like the files people share: 32 pictures in one style with two backgrounds
and a handful of companions, so a LoRA learns its context along with its concept. `unbiased` has as
many pictures with every context.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from cmlora.adapters.training.pictures import Example
from cmlora.adapters.training.settings import Settings
from cmlora.adapters.training.trainer import Trainer
from cmlora.emoji.base import to_tensor
from cmlora.emoji.captions import caption
from cmlora.emoji.latents import PatchBasis
from cmlora.emoji.paths import WEIGHTS, work_folder
from cmlora.emoji.scenes import Scene, render, sample
from cmlora.emoji.schedule import scheduler
from cmlora.emoji.weights import LORAS, Series
from cmlora.emoji.world import BY_CONCEPT, KNOWN, SIZE, Category, Element

PICTURES = 32
RANK = 8
BATCH = 16
RATE = 2e-3
STEPS = 400
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out",
    "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
)  # fmt: skip


def context(concept: str, series: Series) -> Mapping[Category, tuple[Element, ...]]:
    """What may stand beside a concept in its training pictures.

    Args:
        concept: its id.
        series: ``unbiased`` allows everything the base knows; ``biased`` two backgrounds, no
            style, three characters, two kinds of headwear and three objects, which differ from
            concept to concept.
    """
    if series == "unbiased":
        return KNOWN
    place = LORAS.index(concept)

    def some(category: Category, count: int) -> tuple[Element, ...]:
        options = KNOWN[category]
        return tuple(options[(5 * place + 7 * i) % len(options)] for i in range(count))

    return {
        "character": some("character", 3),
        "clothing": some("clothing", 2),
        "style": (),
        "background": some("background", 2),
        "object": some("object", 3),
    }


def training_scenes(concept: str, series: Series) -> list[tuple[Scene, np.random.Generator]]:
    """The scenes of a LoRA's training set, each with the generator that draws it."""
    element = BY_CONCEPT[concept]
    choices = context(concept, series)
    made = []
    for index in range(PICTURES):
        rng = np.random.default_rng((21, LORAS.index(concept), index))
        made.append((sample(rng, choices=choices, fixed={element.category: element}), rng))
    return made


def train(
    concept: str,
    series: Series,
    destination: Path,
    *,
    models: Path | None = None,
    steps: int = STEPS,
    rank: int = RANK,
) -> Path:
    """Train one LoRA on the UNet, or continue; saved in diffusers format with metadata.

    Args:
        concept: its id.
        series: ``biased`` or ``unbiased``.
        destination: folder for ``<concept>.safetensors``.
        models: folder with ``unet`` and ``text_encoder``; by default the last trained base, or the
            shipped model where none has been trained.
        steps: optimizer steps of 16 pictures.
        rank: of the LoRA.

    Returns:
        The file.
    """
    torch.set_flush_denormal(True)
    element, number, folder = BY_CONCEPT[concept], LORAS.index(concept), work_folder()
    trained = folder / "base"
    models = models or (trained if trained.is_dir() else WEIGHTS / "model")
    tokenizer = models / "tokenizer"
    unet = UNet2DConditionModel.from_pretrained(models / "unet").float()
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=CLIPTextModel.from_pretrained(models / "text_encoder").float(),
        tokenizer=CLIPTokenizer.from_pretrained(
            tokenizer if tokenizer.is_dir() else folder / "tokenizer"
        ),
        unet=unet.to(memory_format=torch.channels_last),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    scenes = training_scenes(concept, series)
    pictures = to_tensor(np.stack([render(scene, rng) for scene, rng in scenes]))
    latents = _latents(pictures, folder / "basis.safetensors")
    examples = [
        Example(latent, partial(caption, scene))
        for latent, (scene, _) in zip(latents, scenes, strict=True)
    ]
    settings = Settings(
        output=str(folder / "training" / f"{series}_{concept}"),
        name=concept,
        category=element.category,
        rank=rank,
        alpha=rank,
        targets=TARGETS,
        resolution=SIZE,
        caption_dropout=0.1,
        order="random",
        steps=steps,
        batch=BATCH,
        rate=RATE,
        schedule="linear",
        warmup=30,
        optim_options={"betas": [0.9, 0.99], "weight_decay": 0.01},
        seed=number,
        dtype="float16",
        header={
            "cmlora.name": element.name,
            "cmlora.series": series,
            "cmlora.triggers": json.dumps([element.trigger]),
        },
    )
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{concept} ({series})", total=steps)
        outcome = Trainer(pipe, settings, examples).run(
            lambda step, loss: bar.update(
                task, completed=step, description=f"{concept} ({series}) loss {loss:.3f}"
            )
        )
    destination.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(outcome.path, destination))


@torch.no_grad()
def _latents(pictures: Tensor, basis: Path) -> Tensor:
    """Latents (n, 12, 16, 16) of pictures; the shipped encoder computes what the basis would."""
    if basis.is_file():
        return PatchBasis.load(basis).encode(pictures)
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "model" / "vae").float()
    mean: Tensor = vae.encode(pictures).latent_dist.mean
    return mean
