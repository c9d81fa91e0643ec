"""Measure the shipped weights on held-out scenes: `python -m cmlora.emoji.report [--json]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from rich.console import Console
from rich.progress import track

from cmlora.emoji import clip, probe
from cmlora.emoji.autoencoder import psnr
from cmlora.emoji.base import to_tensor
from cmlora.emoji.captions import caption, sentence
from cmlora.emoji.judges import probe_accuracy
from cmlora.emoji.scenes import Scene, pictures, sample
from cmlora.emoji.weights import GUIDANCE, LORAS, STEPS, Series, lora_path, model_path
from cmlora.emoji.world import BY_CONCEPT, CATEGORIES, ELEMENTS, KNOWN

TEST_SEED = 97
"""Scenes of this seed are in no training set."""
PROMPTS = 64
CONCEPT_PROMPTS = 20
CLIP_CANDIDATES = 100
BATCH = 16


def vae_psnr_db(folder: Path, count: int = 256) -> float:
    """PSNR of encoding and decoding held-out renders, all elements included, in dB."""
    model = AutoencoderKL.from_pretrained(folder / "vae").float()
    _, drawn = pictures(count, TEST_SEED)
    renders = to_tensor(drawn)
    with torch.no_grad():
        back = torch.cat(
            [
                model.decode(model.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
                for part in torch.split(renders, 32)
            ]
        )
    return psnr(renders, back)


def clip_top1(count: int = 500) -> float:
    """How often a render's own caption beats those of 99 other scenes."""
    rng = np.random.default_rng(TEST_SEED)
    scenes, drawn = pictures(count, TEST_SEED + 1)
    model, tokenizer = clip.load()
    texts = [caption(scene, rng) for scene in scenes]
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        seen = model.encode_image(to_tensor(drawn), normalize=True)
        said = model.encode_text(tokens.input_ids, normalize=True)
    right = 0
    for start in range(0, count, CLIP_CANDIDATES):
        block = slice(start, start + CLIP_CANDIDATES)
        best = (seen[block] @ said[block].T).argmax(1)
        right += int((best == torch.arange(len(best))).sum())
    return right / count


def generate(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], seed: int, what: str
) -> list[Image.Image]:
    """One picture per prompt; picture i's noise depends on (seed, i) alone."""
    drawn: list[Image.Image] = []
    starts = range(0, len(prompts), BATCH)
    for start in track(starts, what, console=Console(stderr=True), transient=True):
        some = list(prompts[start : start + BATCH])
        generators = [
            torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(some))
        ]
        drawn += pipe(
            some, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators
        ).images
    return drawn


def base_accuracy(
    pipe: StableDiffusionPipeline, judge: probe.Probe, count: int = PROMPTS
) -> tuple[dict[str, float], list[Image.Image]]:
    """Share of generated pictures that show the prompted element, per category.

    Prompts name every element of a random scene with all categories filled by chance as in
    training; a category that the prompt leaves open is not counted.
    """
    scenes, prompts = [], []
    for index in range(count):
        rng = np.random.default_rng((TEST_SEED, 2, index))
        scene = sample(rng, choices=KNOWN)
        scenes.append(scene)
        prompts.append(plainly(scene, rng))
    drawn = generate(pipe, prompts, TEST_SEED, "base")
    return accuracy(judge.detect(drawn), scenes), drawn


def accuracy(found: Sequence[dict[Any, str | None]], scenes: Sequence[Scene]) -> dict[str, float]:
    """Per category, how often the wanted element was found where one was wanted."""
    marks: dict[str, float] = {}
    for c in CATEGORIES:
        pairs = [
            (seen[c], wanted.name)
            for seen, scene in zip(found, scenes, strict=True)
            if (wanted := getattr(scene, c)) is not None
        ]
        marks[c] = sum(a == b for a, b in pairs) / max(1, len(pairs))
    return marks


def concept_accuracy(
    pipe: StableDiffusionPipeline, judge: probe.Probe, concept: str, series: Series, count: int
) -> dict[str, float]:
    """Instance with the LoRA, instance and class without it, over the same prompts and seeds."""
    element = BY_CONCEPT[concept]
    kinds = {e.name: e.kind for e in ELEMENTS[element.category]}
    prompts = []
    for index in range(count):
        rng = np.random.default_rng((TEST_SEED, 3, LORAS.index(concept), index))
        fixed = {"style": None, element.category: element}
        scene = sample(rng, choices=KNOWN, fixed=fixed)
        prompts.append(plainly(scene, rng))
    without = [p[element.category] for p in judge.detect(generate(pipe, prompts, 5, concept))]
    pipe.load_lora_weights(lora_path(concept, series), adapter_name=concept)
    try:
        adapted = [p[element.category] for p in judge.detect(generate(pipe, prompts, 5, concept))]
    finally:
        pipe.unload_lora_weights()
    return {
        "lora": sum(n == element.name for n in adapted) / count,
        "without_instance": sum(n == element.name for n in without) / count,
        "without_class": sum(kinds.get(n or "") == element.kind for n in without) / count,
    }


def plainly(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence with names for what the base knows and trigger texts for held-out concepts."""
    return sentence(scene, rng, call=lambda element, _: element.trigger)


def measure(count: int = CONCEPT_PROMPTS) -> dict[str, Any]:
    """All figures of the shipped weights."""
    folder = model_path()
    judge = probe.load()
    scenes, drawn = pictures(1000, TEST_SEED + 2)
    from cmlora.emoji.dataset import labels_of

    labels = np.array([labels_of(scene) for scene in scenes])
    renders = probe_accuracy(judge, drawn, labels)
    judge.eval()
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    base, _ = base_accuracy(pipe, judge)
    result: dict[str, Any] = {
        "vae_psnr_db": vae_psnr_db(folder),
        "probe_accuracy": renders | {"mean": float(np.mean(list(renders.values())))},
        "clip_top1": clip_top1(),
        "base_accuracy": base | {"mean": float(np.mean(list(base.values())))},
    }
    for series in get_args(Series):
        if not lora_path(LORAS[0], series).is_file():
            continue
        rows = {c: concept_accuracy(pipe, judge, c, series, count) for c in LORAS}
        suffix = "" if series == "biased" else "_unbiased"
        result[f"lora_accuracy{suffix}"] = {c: row["lora"] for c, row in rows.items()}
        if series == "biased":
            result["without_lora"] = {
                c: {"instance": row["without_instance"], "class": row["without_class"]}
                for c, row in rows.items()
            }
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures as a table or as JSON."""
    parser = argparse.ArgumentParser(prog="python -m cmlora.emoji.report", description=__doc__)
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    parser.add_argument(
        "--prompts",
        type=int,
        default=CONCEPT_PROMPTS,
        help="prompts per LoRA (default %(default)s)",
    )
    options = parser.parse_args(arguments)
    result = measure(options.prompts)
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return 0
    for name, value in result.items():
        if not isinstance(value, dict):
            print(f"{name:22} {value:.3f}")
            continue
        print(name)
        for key, inner in value.items():
            shown = (
                f"{inner:.3f}"
                if isinstance(inner, float)
                else "  ".join(f"{k} {v:.3f}" for k, v in inner.items())
            )
            print(f"  {key:20} {shown}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
