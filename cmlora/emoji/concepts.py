"""Train the eleven concept LoRAs, with diffusers and peft, from a few dozen pictures each.

Two series. `biased` is like the files people share: 32 pictures in one style with two backgrounds
and a handful of companions, so a LoRA learns its context along with its concept. `unbiased` has as
many pictures with every context.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from rich.console import Console
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from cmlora.emoji.base import emphasis, to_tensor
from cmlora.emoji.captions import caption
from cmlora.emoji.dataset import labels_of
from cmlora.emoji.latents import PatchBasis
from cmlora.emoji.paths import work_folder
from cmlora.emoji.scenes import Scene, render, sample
from cmlora.emoji.schedule import noised, scheduler, v_target, v_weight
from cmlora.emoji.weights import LORAS, Series
from cmlora.emoji.world import BY_CONCEPT, KNOWN, Category, Element

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
    """Train one LoRA on the UNet and save it in diffusers format with metadata.

    Args:
        concept: its id.
        series: ``biased`` or ``unbiased``.
        destination: folder for ``<concept>.safetensors``.
        models: folder with ``unet`` and ``text_encoder``; the last trained base by default.
        steps: optimizer steps of 16 pictures.
        rank: of the LoRA.

    Returns:
        The file.
    """
    torch.set_flush_denormal(True)
    folder = work_folder()
    models = models or folder / "base"
    unet = UNet2DConditionModel.from_pretrained(models / "unet").float()
    unet.to(memory_format=torch.channels_last)
    text_encoder = CLIPTextModel.from_pretrained(models / "text_encoder").float()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    basis = PatchBasis.load(folder / "basis.safetensors")
    scenes = training_scenes(concept, series)
    pictures = to_tensor(np.stack([render(scene, rng) for scene, rng in scenes]))
    latents = basis.encode(pictures)
    weights = emphasis(np.array([labels_of(scene) for scene, _ in scenes]))
    torch.manual_seed(LORAS.index(concept))
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)), adapter_name=concept
    )
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, betas=(0.9, 0.99), weight_decay=0.01)
    alphas_cumprod = scheduler().alphas_cumprod
    console = Console(stderr=True)
    began, losses = time.monotonic(), []
    for step in range(steps):
        rng = np.random.default_rng((31, LORAS.index(concept), step))
        rows = rng.integers(PICTURES, size=BATCH)
        texts = ["" if rng.random() < 0.1 else caption(scenes[row][0], rng) for row in rows]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        generator = torch.Generator().manual_seed(1_000_003 * LORAS.index(concept) + step)
        clean = latents[torch.from_numpy(rows)].contiguous(memory_format=torch.channels_last)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(1000, (BATCH,), generator=generator)
        alphas = alphas_cumprod[timesteps]
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 30) * (1 - step / steps)
        with torch.no_grad():
            hidden = text_encoder(tokens.input_ids)[0]
        predicted = unet(noised(clean, noise, alphas), timesteps, hidden, return_dict=False)[0]
        error = (predicted - v_target(clean, noise, alphas)).square().mean(1)
        error = (error * weights[torch.from_numpy(rows)]).mean((1, 2))
        loss = (error * v_weight(alphas)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    pace = steps * BATCH / (time.monotonic() - began)
    console.print(
        f"{concept} ({series}): loss {np.mean(losses[:50]):.4f} -> {np.mean(losses[-50:]):.4f}, "
        f"{pace:.1f} pictures/s"
    )
    return _save(unet, concept, series, destination, rank)


def _save(
    unet: UNet2DConditionModel, concept: str, series: Series, destination: Path, rank: int
) -> Path:
    element = BY_CONCEPT[concept]
    state = get_peft_model_state_dict(unet, adapter_name=concept)
    tensors = {f"unet.{key}": value.half().contiguous() for key, value in state.items()}
    config = {
        "unet.r": rank,
        "unet.lora_alpha": rank,
        "unet.target_modules": sorted(TARGETS),
        "unet.peft_type": "LORA",
    }
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(config, sort_keys=True),
        "cmlora.name": element.name,
        "cmlora.category": element.category,
        "cmlora.triggers": json.dumps([element.word, element.description]),
        "cmlora.base": "emoji",
        "cmlora.series": series,
    }
    destination.mkdir(parents=True, exist_ok=True)
    path = destination / f"{concept}.safetensors"
    save_file(tensors, path, metadata)
    return path
