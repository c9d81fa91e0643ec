"""Train what judges pictures of the emoji world: the probe and the small CLIP."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from cmlora.emoji import clip
from cmlora.emoji.base import to_tensor, training_tokenizer
from cmlora.emoji.captions import caption
from cmlora.emoji.checkpoint import Checkpoint
from cmlora.emoji.dataset import dataset
from cmlora.emoji.latents import PatchBasis
from cmlora.emoji.paths import work_folder
from cmlora.emoji.probe import Probe
from cmlora.emoji.world import CATEGORIES

PICTURES = 40_000
TEST = 1000


def roughened(pictures: Tensor, basis: PatchBasis, generator: torch.Generator) -> Tensor:
    """Pictures as a generator might draw them: each third plain, noisy, or through rough latents.

    The judges must read generated pictures, which are never as clean as renders.
    """
    third = len(pictures) // 3
    noisy = pictures[:third]
    level = torch.rand(third, 1, 1, 1, generator=generator) * 0.15
    noisy = noisy + level * torch.randn(noisy.shape, generator=generator)
    latents = basis.encode(pictures[third : 2 * third])
    level = torch.rand(len(latents), 1, 1, 1, generator=generator) * 0.3
    rough = basis.decode(latents + level * torch.randn(latents.shape, generator=generator))
    return torch.cat([noisy, rough, pictures[2 * third :]]).clamp(-1, 1)


def shifted(pictures: Tensor, generator: torch.Generator, most: int = 3) -> Tensor:
    """All pictures moved by the same few pixels, edges repeated."""
    dy, dx = torch.randint(0, 2 * most + 1, (2,), generator=generator).tolist()
    padded = nn.functional.pad(pictures, (most, most, most, most), mode="replicate")
    return padded[:, :, dy : dy + pictures.shape[2], dx : dx + pictures.shape[3]]


def train_probe(steps: int, seed: int = 0, batch: int = 64, rate: float = 3e-3) -> Path:
    """Train the probe, or continue, on renders of everything, held-out concepts included."""
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    console = Console(stderr=True)
    folder = work_folder()
    data = dataset("probe", PICTURES, seed=2, held_out=True)
    test = dataset("test", TEST, seed=3, held_out=True)
    basis = PatchBasis.load(folder / "basis.safetensors")
    probe = Probe().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(probe.parameters(), rate, weight_decay=0.02)
    labels = torch.from_numpy(data.labels.astype(np.int64))
    checkpoint = Checkpoint(folder / "probe.checkpoint.pt", probe, None, optimizer)
    start = checkpoint.resume()
    began, path = time.monotonic(), folder / "probe.safetensors"
    for step in range(start, steps):
        rng = np.random.default_rng((seed, step))
        rows = rng.integers(PICTURES, size=batch)
        generator = torch.Generator().manual_seed(seed * 10_000_019 + step)
        pictures = shifted(to_tensor(data.pictures[rows]), generator)
        pictures = roughened(pictures, basis, generator)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (1 - step / steps)
        logits = probe(pictures.contiguous(memory_format=torch.channels_last))
        loss = torch.stack(
            [
                nn.functional.cross_entropy(logits[c], labels[rows, i], label_smoothing=0.02)
                for i, c in enumerate(CATEGORIES)
            ]
        ).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            marks = probe_accuracy(probe, test.pictures, test.labels)
            state = {
                k: v.half() if v.is_floating_point() else v for k, v in probe.state_dict().items()
            }
            save_file({k: v.contiguous() for k, v in state.items()}, path)
            checkpoint.save(step + 1)
            pace = (step + 1 - start) * batch / (time.monotonic() - began)
            shown = " ".join(f"{c} {v:.4f}" for c, v in marks.items())
            console.print(f"step {step + 1}/{steps} loss {float(loss):.3f} {shown} {pace:.0f}/s")
    return path


@torch.no_grad()
def probe_accuracy(probe: Probe, pictures: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Share of renders whose element is named correctly, per category."""
    probe.eval()
    right = np.zeros(len(CATEGORIES))
    for start in range(0, len(pictures), 250):
        logits = probe(to_tensor(pictures[start : start + 250]))
        for i, c in enumerate(CATEGORIES):
            found = logits[c].argmax(1).numpy()
            right[i] += (found == labels[start : start + 250, i]).sum()
    probe.train()
    return {c: float(n / len(pictures)) for c, n in zip(CATEGORIES, right, strict=True)}


def train_clip(steps: int, seed: int = 0, batch: int = 128, rate: float = 1e-3) -> Path:
    """Train the small CLIP on scene and caption pairs, or continue; saves an open_clip folder."""
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    console = Console(stderr=True)
    folder = work_folder()
    data = dataset("probe", PICTURES, seed=2, held_out=True)
    basis = PatchBasis.load(folder / "basis.safetensors")
    tokenizer = training_tokenizer()
    config = json.loads(json.dumps(clip.MODEL_CONFIG))
    config["text_cfg"]["vocab_size"] = len(tokenizer)
    model = clip.open_clip().CLIP(**config)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.05)
    checkpoint = Checkpoint(folder / "clip.checkpoint.pt", model, None, optimizer)
    start = checkpoint.resume()
    began, losses, path = time.monotonic(), [], folder / "clip"
    for step in range(start, steps):
        rng = np.random.default_rng((seed, step))
        rows = rng.integers(PICTURES, size=batch)
        generator = torch.Generator().manual_seed(seed * 10_000_019 + step)
        pictures = roughened(to_tensor(data.pictures[rows]), basis, generator)
        texts = [caption(data.scene(row), rng) for row in rows.tolist()]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 200) * (1 - step / steps)
        seen = model.encode_image(pictures, normalize=True)
        said = model.encode_text(tokens.input_ids, normalize=True)
        logits = model.logit_scale.exp() * seen @ said.T
        same = torch.arange(batch)
        loss = nn.functional.cross_entropy(logits, same) + nn.functional.cross_entropy(
            logits.T, same
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(float(loss.detach()))
        if (step + 1) % 250 == 0 or step + 1 == steps:
            _export_clip(model, config, tokenizer, path)
            checkpoint.save(step + 1)
            pace = (step + 1 - start) * batch / (time.monotonic() - began)
            console.print(f"step {step + 1}/{steps} loss {np.mean(losses[-250:]):.4f} {pace:.0f}/s")
    return path


def _export_clip(model: nn.Module, config: dict[str, Any], tokenizer: object, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(state, path / "open_clip_model.safetensors")
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    (path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}, indent=2) + "\n"
    )
    tokenizer.save_pretrained(path / "tokenizer")  # type: ignore[attr-defined]
