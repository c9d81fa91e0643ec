"""Train the embedded base model: text encoder and UNet together, from scratch, on two cores."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cmlora.emoji.captions import caption, made_up_word
from cmlora.emoji.checkpoint import Averaged, Checkpoint
from cmlora.emoji.dataset import Dataset, dataset
from cmlora.emoji.latents import CHANNELS, PatchBasis
from cmlora.emoji.paths import work_folder
from cmlora.emoji.schedule import noised, scheduler, v_target, v_weight
from cmlora.emoji.tokens import LENGTH, train_tokenizer

PICTURES = 80_000
BATCH = 32
RATE = 1e-3
WARMUP = 300
EMPTY = 0.1
SAVE_EVERY = 200


def build_unet() -> UNet2DConditionModel:
    """Three levels with attention on all of them, on 16x16 latents."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(48, 96, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 128 over the project's own tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def training_tokenizer() -> CLIPTokenizer:
    """The tokenizer, learnt once from 20,000 captions and as many made-up words as a sixth."""
    folder = work_folder() / "tokenizer"
    if not folder.exists():
        from cmlora.emoji.scenes import sample

        rng = np.random.default_rng(7)
        texts = [caption(sample(rng), rng) for _ in range(20_000)]
        words = [made_up_word(rng) for _ in range(3000)]
        train_tokenizer([*texts, *words]).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def to_tensor(pictures: Any) -> Tensor:
    """uint8 (n, H, W, 3) to float (n, 3, H, W) in -1..1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def encoded(data: Dataset, name: str) -> tuple[Tensor, PatchBasis]:
    """Latents of a whole data set as fp16, kept on disk, and the basis they are in."""
    folder = work_folder()
    basis_file, latent_file = folder / "basis.safetensors", folder / f"{name}.latents.pt"
    if not basis_file.exists():
        PatchBasis.fit(to_tensor(data.pictures[:8000])).save(basis_file)
    basis = PatchBasis.load(basis_file)
    if not latent_file.exists():
        parts = [
            basis.encode(to_tensor(data.pictures[i : i + 1000])).half()
            for i in range(0, len(data.pictures), 1000)
        ]
        torch.save(torch.cat(parts), latent_file)
    return torch.load(latent_file, weights_only=True), basis


def emphasis(labels: Any) -> Tensor:
    """How much each place of the latents counts: objects four times, headwear three times.

    Both are small, so that a model which leaves them out loses little; the boxes are where
    `scenes.render` may draw them.

    Args:
        labels: (n, 5), as of `Dataset`.

    Returns:
        Weights (n, 16, 16).
    """
    weights = torch.ones(len(labels), 16, 16)
    character, clothing, _, _, thing = (torch.from_numpy(np.array(labels)) > 0).T
    weights[clothing & thing, 3:10, 2:10] += 2
    weights[clothing & ~thing, 3:10, 3:13] += 2
    weights[character & thing, 8:16, 9:16] += 3
    weights[~character & thing, 5:15, 3:14] += 3
    return weights


def train(steps: int, seed: int = 0) -> Path:
    """Train, or continue from the last checkpoint.

    Args:
        steps: length of the whole run in batches of `BATCH`; over its second half the rate falls
            to zero.
        seed: of initialisation, noise and captions; step i's batch depends on (seed, i) alone.

    Returns:
        The folder that holds the averaged models, `unet/` and `text_encoder/`.
    """
    console = Console(stderr=True)
    folder = work_folder()
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    tokenizer = training_tokenizer()
    latents, _ = encoded(data := dataset("base", PICTURES, seed=1, held_out=False), "base")
    unet = build_unet().to(memory_format=torch.channels_last)
    text_encoder = build_text_encoder(tokenizer)
    models = nn.ModuleList([unet, text_encoder])
    average = Averaged(models)
    optimizer = torch.optim.AdamW(
        models.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    alphas_cumprod = scheduler().alphas_cumprod
    checkpoint = Checkpoint(folder / "base.checkpoint.pt", models, average, optimizer)
    start = checkpoint.resume()
    if start:
        console.print(f"continuing at step {start}")
    began, losses = time.monotonic(), []
    for step in range(start, steps):
        rng = np.random.default_rng((seed, step))
        rows = rng.integers(len(latents), size=BATCH)
        texts = [
            "" if rng.random() < EMPTY else caption(data.scene(row), rng) for row in rows.tolist()
        ]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        generator = torch.Generator().manual_seed(seed * 10_000_019 + step)
        clean = (
            latents[torch.from_numpy(rows)].float().contiguous(memory_format=torch.channels_last)
        )
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(1000, (BATCH,), generator=generator)
        alphas = alphas_cumprod[timesteps]
        rate = RATE * min(1.0, (step + 1) / WARMUP, 2 * (1 - step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        hidden = text_encoder(tokens.input_ids)[0]
        predicted = unet(noised(clean, noise, alphas), timesteps, hidden, return_dict=False)[0]
        error = (predicted - v_target(clean, noise, alphas)).square().mean(1)
        error = (error * emphasis(data.labels[rows])).mean((1, 2))
        loss = (error * v_weight(alphas)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        average.update()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"the loss is {losses[-1]} at step {step}; lower the rate")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            pace = (step + 1 - start) * BATCH / (time.monotonic() - began)
            console.print(
                f"step {step + 1}/{steps} loss {np.mean(losses[-SAVE_EVERY:]):.4f} "
                f"{pace:.1f} pictures/s"
            )
            checkpoint.save(step + 1)
            with average.applied():
                _export(folder / "base", unet, text_encoder)
    return folder / "base"


def _export(folder: Path, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
    """Save the models in diffusers and transformers format, fp16."""
    half = build_unet()
    half.load_state_dict(unet.state_dict())
    half.half().save_pretrained(folder / "unet")
    text = CLIPTextModel(text_encoder.config)
    text.load_state_dict(text_encoder.state_dict())
    text.half().save_pretrained(folder / "text_encoder")
