"""Studies made up of numbers, with grey pictures, for tests of what is computed from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmlora.eval.manifest import set_id
from cmlora.eval.study import Study, digest_of
from cmlora.eval.testbeds import find_testbed
from cmlora.eval.variants import read
from cmlora.recipe import Recipe, save_png

WORDS = ("naive", "merge", "switch", "composite", "cmlora@nonuniform")
COST = {"naive": 30, "merge": 30, "switch": 30, "composite": 30, "cmlora": 12}

Quality = Callable[[str, int, np.random.Generator], float]


def gains(method: str, n: int, rng: np.random.Generator) -> float:
    """A share of concepts found; composite is best and naive is worst."""
    level = {"naive": 0.1, "merge": 0.5, "switch": 0.5, "composite": 0.95, "cmlora": 0.7}[method]
    return float(rng.binomial(n, level)) / n


def make_study(
    folder: Path,
    *,
    testbed: str = "emoji",
    quality: Quality = gains,
    sizes: tuple[int, ...] = (2, 3, 4, 5),
    sets: int = 20,
    seeds: tuple[int, ...] = (0, 1),
    words: tuple[str, ...] = WORDS,
    metrics: tuple[str, ...] = ("instances", "clip_score"),
) -> Study:
    """A run's folder with records, grey pictures and scores.

    Args:
        folder: to be made.
        testbed: a shipped one.
        quality: of a picture, by method and N.
        sizes: N.
        sets: per N.
        seeds: per set.
        words: the methods.
        metrics: that get the quality, in their own range.
    """
    manifest = find_testbed(testbed)
    folder.mkdir(parents=True)
    settings: dict[str, Any] = {
        "cmlora_run": 1,
        "testbed": manifest.to_dict(),
        "model_hash": "0" * 64,
        "dtype": "float32",
        "options": {},
        "loras": [
            {
                "id": lora.id,
                "sha256": "1" * 64,
                "frequency": 0.3,
                "window": [0, 1],
                "fractions": [0, 0.5],
                "ratio": [0.2, 0.1 * place],
                "norm": [1, 0.5],
            }
            for place, lora in enumerate(manifest.loras)
        ],
        "pass_macs": {"full": 10**9, "light": 10**8},
    }
    (folder / "run.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    scores: list[dict[str, Any]] = []
    for ids in (ids for n in sizes for ids in manifest.sample(n, sets)):
        for seed in seeds:
            for variant in read(words):
                number = len(records)
                key = f"{number:064x}"
                name = f"images/{set_id(ids)}/{variant.slug}_{seed}.png"
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                grey = Image.new("RGB", (16, 16), (number % 256, number // 256, 9))
                recipe = Recipe("emoji", manifest.prompt_of(ids), seed, 30, 16, 16)
                save_png(grey, path, recipe)
                n = len(ids)
                passes = 30 * n if variant.method in ("composite", "cmlora") else 30
                full = passes if variant.cache == "none" else 30 + n
                records.append(
                    {
                        "key": key,
                        "ids": list(ids),
                        "method": variant.method,
                        "cache": variant.cache,
                        "seed": seed,
                        "image": name,
                        "sha256": digest_of(path),
                        "seconds": 0.01 * full + 0.004 * (passes - full),
                        "full": full,
                        "light": passes - full,
                        "macs": full * 10**9 + (passes - full) * 10**8,
                        "options": dict(variant.options),
                        "variant": variant.label,
                    }
                )
                value = quality(variant.method, n, rng)
                found = {metric: value for metric in metrics}
                if "clip_score" in found:
                    found["clip_score"] = 20 + 10 * value
                scores.append(
                    {
                        "key": key,
                        "image": records[-1]["sha256"],
                        "scorer": "probe",
                        "version": "made up",
                        "values": found,
                        "concepts": {id_: {"instance": value} for id_ in ids},
                    }
                )
    for place, rows in (("records/part-00000", records), ("scores/probe-00000", scores)):
        file = folder / f"{place}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Study(folder)
