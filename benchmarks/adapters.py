"""What every tuner and optimizer makes of the same two concepts of the embedded world.

    python benchmarks/adapters.py                       # everything, into benchmarks/adapters.md
    python benchmarks/adapters.py --only lora,nola,galore --steps 20 --pictures 2

Every row is trained in a process of its own, so that its peak of memory is its own; rows that are
done are kept in adapters.jsonl beside the table, and an interrupted run continues. Nothing is
tuned: ranks are the published ones scaled to layers of 48 to 192 channels, learning rates are the
published ones where they are 1e-3 or more, and that of the embedded LoRAs otherwise.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RATE = 2e-3
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out",
    "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
)  # fmt: skip
CONCEPTS = ("character_1", "object_1")
FULL_RATE = 2e-4

TUNERS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8},
    "rslora": {"rank": 8},
    "dora": {"rank": 8},
    "loha": {"rank": 8},
    "lokr": {"rank": 8},
    "ia3": {"rate": 3e-3},
    "nola": {"rank": 8, "rate": 5e-3, "options": {"down_count": 64, "up_count": 64}},
    "randlora": {"rank": 16, "alpha": 320.0, "rate": 1e-3},
    "vera": {"rank": 64, "rate": 1e-2},
    "lora_xs": {"rank": 16, "rate": 1e-3},
    "lora_sb": {"rank": 16},
    "pissa": {"rank": 8},
    "loldu": {"rank": 48},
    "svfit": {"rank": 48},
    "hydra": {"rank": 4, "rate": 1e-3, "options": {"sequential_r": 4}},
    "block_lora": {"rank": 8, "options": {"blocks": 2}},
    "snell": {"rank": 8, "rate": 1e-3},
    "snella": {"rank": 8, "rate": 1e-3, "options": {"sparsity": 0.1}},
    "s2ft": {"rate": 1e-3, "options": {"share": 0.05}},
    "dylora": {"rank": 8},
    "maestro": {"rank": 8},
    "allora": {"rank": 8},
    "orthogonal": {"rank": 8},
    "sltrain": {"rank": 8, "alpha": 2.0, "rate": 3e-3},
    "lost": {"rank": 8},
    "oft": {"rank": 16},
    "boft": {"rank": 8, "options": {"count": 1}},
    "miss": {"rank": 8},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "full_adamw": {"optim": "adamw"},
    "full_galore": {"optim": "galore", "optim_options": {"rank": 16, "gap": 100}},
    "full_fira": {"optim": "fira", "optim_options": {"rank": 16, "gap": 100}},
    "full_frugal": {"optim": "frugal", "optim_options": {"density": 0.25, "gap": 100}},
    "full_dct": {"optim": "dct", "optim_options": {"rank": 16}},
    "lora_pro": {"optim": "lora_pro", "rank": 8},
}
ROWS = {**TUNERS, **OPTIMIZERS}


def settings_of(row: str, steps: int, folder: str) -> Any:
    """The settings of one row."""
    from cmlora.adapters.training import Settings

    full = row.startswith("full_")
    plain: dict[str, Any] = {
        "output": folder,
        "name": "bench",
        "tuner": row if row in TUNERS else "lora",
        "targets": TARGETS,
        "full": full,
        "resolution": 64,
        "steps": steps,
        "batch": 16,
        "rate": FULL_RATE if full else RATE,
        "schedule": "linear",
        "warmup": min(30, steps),
        "order": "random",
        "caption_dropout": 0.1,
        "min_snr": 5.0,
        "dtype": "float16",
        "save_every": 10**6,
    }
    return Settings(**plain | ROWS[row])


def train_one(row: str, concept: str, steps: int, pictures: int, model: str) -> dict[str, Any]:
    """Trains one row on one concept in this process, and looks at its pictures."""
    import torch
    from PIL import Image

    from cmlora.adapters.training import Example, Trainer
    from cmlora.adapters.training.optim.lowrank import numbers
    from cmlora.emoji.captions import caption
    from cmlora.emoji.concepts import training_scenes
    from cmlora.emoji.scenes import render
    from cmlora.pipelines.models import open_pipeline

    torch.set_flush_denormal(True)
    torch.set_num_threads(max(1, torch.get_num_threads()))
    pipe = open_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(torch.float32)
    examples = []
    for scene, rng in training_scenes(concept, "biased"):
        picture = Image.fromarray(render(scene, rng))
        examples.append(Example(picture, lambda random, scene=scene: caption(scene, random)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(pipe, settings_of(row, steps, folder), examples)
        before, began = _peak(), time.perf_counter()
        outcome = trainer.run()
        seconds, after = time.perf_counter() - began, _peak()
        files = [outcome.path] if outcome.path.is_file() else list(outcome.path.iterdir())
        size = sum(file.stat().st_size for file in files)
    tenth = max(1, steps // 10)
    return {
        "row": row,
        "concept": concept,
        "steps": steps,
        "trained": outcome.trained,
        "state": numbers(trainer.optimizer),
        "bytes": size,
        "peak_mib": max(0.0, after - before) / 1024,
        "seconds": seconds,
        "loss": sum(outcome.losses[-tenth:]) / tenth,
        "accuracy": accuracy(pipe, concept, pictures),
        "pictures": pictures,
    }


def accuracy(pipe: Any, concept: str, pictures: int) -> float | None:
    """The share of pictures in which the probe sees the concept; none without a probe."""
    import numpy as np
    import torch

    from cmlora.emoji import probe
    from cmlora.emoji.captions import caption
    from cmlora.emoji.scenes import sample
    from cmlora.emoji.weights import GUIDANCE, STEPS
    from cmlora.emoji.world import BY_CONCEPT

    if not pictures or not probe.PROBE_FILE.is_file():
        return None
    judge, element = probe.load(), BY_CONCEPT[concept]
    seen = 0
    for number in range(pictures):
        rng = np.random.default_rng((77, number))
        scene = sample(rng, fixed={element.category: element})
        image = pipe(
            caption(scene, rng),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(number),
            height=64,
            width=64,
        ).images[0]
        seen += judge.detect([image])[0][element.category] == element.name
    return seen / pictures


def _peak() -> float:
    """The most memory this process ever had, in KiB."""
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def table(results: list[dict[str, Any]], steps: int) -> str:
    """All rows as Markdown, best accuracy first."""
    lines = [
        "# Tuners and optimizers on the embedded model",
        "",
        "Made by `python benchmarks/adapters.py`: means over the concepts "
        f"{', '.join(CONCEPTS)}, {steps} steps of 16 pictures each, 32 pictures per concept. "
        "`seen` is the share of new pictures in which the probe sees the concept. Peak memory is "
        "what training added to the loaded model. Ranks are published ones scaled to the model and "
        "nothing was tuned, so a low place may be the learning rate's fault.",
    ]
    for title, names in (("Tuners", TUNERS), ("Optimizers", OPTIMIZERS)):
        rows = []
        for name in names:
            found = [r for r in results if r["row"] == name]
            if found:
                rows.append((name, {k: _mean(found, k) for k in found[0] if k not in _TEXTS}))
        rows.sort(key=lambda pair: (-(pair[1]["accuracy"] or 0.0), pair[1]["loss"]))
        lines += [
            "",
            f"## {title}",
            "",
            "| name | trained | file KiB | optimizer state | peak MiB | seconds | loss | seen |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for name, mean in rows:
            seen = "-" if mean["accuracy"] is None else f"{mean['accuracy']:.1%}"
            lines.append(
                f"| `{name}` | {mean['trained']:.0f} | {mean['bytes'] / 1024:.0f} | "
                f"{mean['state']:.0f} | {mean['peak_mib']:.0f} | {mean['seconds']:.0f} | "
                f"{mean['loss']:.4f} | {seen} |"
            )
    lines += [
        "",
        "`full_*` train the denoiser itself; their file is the whole denoiser, which "
        "`cmlora extract` turns into a LoRA.",
        "",
    ]
    return "\n".join(lines)


_TEXTS = ("row", "concept")


def _mean(found: list[dict[str, Any]], key: str) -> float | None:
    values = [r[key] for r in found]
    return None if any(v is None for v in values) else sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows, separated by commas")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pictures", type=int, default=32, help="that the probe sees, per concept")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--one", nargs=2, metavar=("ROW", "CONCEPT"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        result = train_one(*chosen.one, chosen.steps, chosen.pictures, chosen.model)
        print(json.dumps(result))
        return
    names = [n for n in chosen.only.split(",") if n] or list(ROWS)
    unknown = [n for n in names if n not in ROWS]
    if unknown:
        parser.error(f"unknown row {unknown[0]}; known: {', '.join(ROWS)}")
    kept = chosen.out.with_suffix(".jsonl")
    lines = kept.read_text().splitlines() if kept.is_file() else []
    results = [r for r in map(json.loads, lines) if r["steps"] == chosen.steps]
    done = {(r["row"], r["concept"]) for r in results}
    options = ["--steps", str(chosen.steps), "--pictures", str(chosen.pictures)]
    for name in names:
        for concept in CONCEPTS:
            if (name, concept) in done:
                continue
            print(f"{name} on {concept} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, *options, "--model", chosen.model]
            run = subprocess.run(
                [*command, "--one", name, concept], stdout=subprocess.PIPE, text=True, check=False
            )
            if run.returncode:
                print(f"{name} on {concept} failed; see above", file=sys.stderr)
                continue
            results.append(json.loads(run.stdout.splitlines()[-1]))
            with kept.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
            chosen.out.write_text(table(results, chosen.steps))
    chosen.out.write_text(table(results, chosen.steps))
    print(chosen.out)


if __name__ == "__main__":
    main()
