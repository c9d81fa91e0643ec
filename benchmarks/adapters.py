"""What every tuner and optimizer makes of the same two concepts of the embedded world.

    python benchmarks/adapters.py                       # everything, into benchmarks/adapters.md
    python benchmarks/adapters.py --only lora,nola,full_galore --steps 20 --pictures 2

Every training has a process of its own, so that its peak of memory is its own. It is kept in
adapters.jsonl beside the table as soon as it is done, and an interrupted run continues with the
next. A training that would take longer than `--budget` seconds starts anew with fewer steps, and
the table says with how many. Nothing is tuned: ranks are the published ones scaled to layers of 48
to 192 channels, learning rates are the published ones where they are 1e-3 or more, and that of the
embedded LoRAs otherwise.
"""

import argparse
import json
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
ROWS: dict[str, dict[str, Any]] = {"none": {}, **TUNERS, **OPTIMIZERS}
"""``none`` is the model as it is: what the probe sees without any training."""

BATCH = 4
"""Pictures per step: with 120 steps and 8 pictures to look at, a row takes about a minute."""

TIMED = 6
"""Steps after which the time of a whole training is foretold; the first one is left out."""


class TooSlow(Exception):
    """A training does not fit into the budget.

    Args:
        steps: that would.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self.steps = steps


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
        "batch": BATCH,
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


def train_one(row: str, concept: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Trains one row on one concept in this process, and looks at its pictures.

    Args:
        row: of `ROWS`.
        concept: of the embedded world.
        asked: steps, pictures, budget and model.
    """
    import torch

    from cmlora.pipelines.models import open_pipeline

    torch.set_flush_denormal(True)
    steps = 0 if row == "none" else asked["steps"]
    while True:
        pipe = open_pipeline(asked["model"])
        pipe.set_progress_bar_config(disable=True)
        pipe.to(torch.float32)
        try:
            found = trained(pipe, row, concept, steps, asked["budget"]) if steps else {}
            break
        except TooSlow as slow:
            steps = slow.steps
    began = time.perf_counter()
    seen = seen_in(pipe, concept, asked["pictures"])
    return {
        "row": row, "concept": concept, "asked": asked, "steps": steps, **found, "seen": seen,
        "drawing": time.perf_counter() - began,
    }  # fmt: skip


def trained(pipe: Any, row: str, concept: str, steps: int, budget: float) -> dict[str, Any]:
    """One training, measured.

    Raises:
        TooSlow: if it would take longer than the budget.
    """
    from PIL import Image

    from cmlora.adapters.training import Example, Trainer
    from cmlora.adapters.training.optim.lowrank import numbers
    from cmlora.emoji.captions import caption
    from cmlora.emoji.concepts import training_scenes
    from cmlora.emoji.scenes import render

    examples = []
    for scene, rng in training_scenes(concept, "biased"):
        picture = Image.fromarray(render(scene, rng))
        examples.append(Example(picture, lambda random, scene=scene: caption(scene, random)))
    ends: list[float] = []

    def watch(done: int, loss: float) -> None:
        ends.append(time.perf_counter())
        if done == TIMED and done < steps:
            each = (ends[-1] - ends[0]) / (done - 1)
            if each * steps > 1.1 * budget:
                raise TooSlow(max(TIMED, int(budget / each)))

    with tempfile.TemporaryDirectory() as folder:
        before, began = _memory(), time.perf_counter()
        trainer = Trainer(pipe, settings_of(row, steps, folder), examples)
        outcome = trainer.run(watch)
        seconds, after = time.perf_counter() - began, _memory("VmHWM")
        files = [outcome.path] if outcome.path.is_file() else list(outcome.path.iterdir())
        size = sum(file.stat().st_size for file in files)
    tenth = max(1, steps // 10)
    return {
        "trained": outcome.trained,
        "state": numbers(trainer.optimizer),
        "bytes": size,
        "peak_mib": max(0.0, after - before) / 1024,
        "seconds": seconds,
        "loss": sum(outcome.losses[-tenth:]) / tenth,
    }


def seen_in(pipe: Any, concept: str, pictures: int) -> int | None:
    """In how many pictures the probe sees the concept; nothing without a probe."""
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
    captions = []
    for number in range(pictures):
        rng = np.random.default_rng((77, number))
        captions.append(caption(sample(rng, fixed={element.category: element}), rng))
    images: list[Any] = []
    for first in range(0, pictures, 8):
        batch = captions[first : first + 8]
        images += pipe(
            batch,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(first + n) for n in range(len(batch))],
            height=64,
            width=64,
        ).images
    return sum(found[element.category] == element.name for found in judge.detect(images))


def _memory(what: str = "") -> float:
    """KiB in use now, or with ``VmHWM`` the most since the call without it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    if not what:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    return float(status[what or "VmRSS"].split()[0])


def table(results: list[dict[str, Any]], asked: dict[str, Any]) -> str:
    """All rows as Markdown, best first."""
    short = sum(bool(r["steps"]) and r["steps"] < asked["steps"] for r in results)
    lines = [
        "# Tuners and optimizers on the embedded model",
        "",
        f"Made by `python benchmarks/adapters.py --steps {asked['steps']} "
        f"--pictures {asked['pictures']} --budget {asked['budget']:g}`: means over the concepts "
        f"{', '.join(CONCEPTS)}, {asked['steps']} steps of {BATCH} pictures each, from 32 pictures "
        "per concept. "
        + (
            f"{short} of {len(results)} trainings were cut to the steps that take "
            f"{asked['budget']:g} seconds here; the column says to how many. "
            if short
            else ""
        )
        + "`seen` counts the new pictures in which the probe sees the concept. Peak memory is what "
        "training added to the loaded model. Ranks are published ones scaled to the model and "
        "nothing was tuned, so a low place may be the learning rate's fault, or that of so few "
        "steps: methods that start from a small share of the weights need more of them.",
    ]
    base = [r for r in results if r["row"] == "none"]
    if base:
        lines += ["", f"Without any training the probe sees the concepts in {_seen(base)}."]
    for title, names in (("Tuners", TUNERS), ("Optimizers", OPTIMIZERS)):
        rows = [(name, [r for r in results if r["row"] == name]) for name in names]
        rows = [(name, found) for name, found in rows if found]
        rows.sort(key=lambda pair: (-(_mean(pair[1], "share") or 0.0), _mean(pair[1], "loss")))
        lines += [
            "",
            f"## {title}",
            "",
            "| name | trained | file KiB | optimizer state | peak MiB | steps | seconds | loss "
            "| seen |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for name, found in rows:
            steps = sorted({r["steps"] for r in found})
            lines.append(
                f"| `{name}` | {_mean(found, 'trained'):.0f} | {_mean(found, 'bytes') / 1024:.0f} "
                f"| {_mean(found, 'state'):.0f} | {_mean(found, 'peak_mib'):.0f} "
                f"| {' and '.join(map(str, steps))} | {_mean(found, 'seconds'):.0f} "
                f"| {_mean(found, 'loss'):.4f} | {_seen(found)} |"
            )
    lines += [
        "",
        "`full_*` train the denoiser itself; their file is the whole denoiser, which "
        "`cmlora extract` turns into a LoRA.",
        "",
    ]
    return "\n".join(lines)


def _seen(found: list[dict[str, Any]]) -> str:
    """How many of how many pictures."""
    if any(r["seen"] is None for r in found):
        return "-"
    return f"{sum(r['seen'] for r in found)} of {sum(r['asked']['pictures'] for r in found)}"


def _mean(found: list[dict[str, Any]], key: str) -> float:
    if key == "share":
        return sum((r["seen"] or 0) / max(1, r["asked"]["pictures"]) for r in found) / len(found)
    return float(sum(r[key] for r in found) / len(found))


def kept_in(path: Path, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """What earlier runs with the same options did; a line that was cut short is left out."""
    results = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if found["asked"] == asked:
            results.append(found)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows, separated by commas")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--pictures", type=int, default=8, help="that the probe sees, per concept")
    parser.add_argument("--budget", type=float, default=600, help="seconds of one training")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--one", nargs=2, metavar=("ROW", "CONCEPT"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    asked = {key: getattr(chosen, key) for key in ("steps", "pictures", "budget", "model")}
    if chosen.one:
        print(json.dumps(train_one(*chosen.one, asked)))
        return
    names = [n for n in chosen.only.split(",") if n] or list(ROWS)
    unknown = [n for n in names if n not in ROWS]
    if unknown:
        parser.error(f"unknown row {unknown[0]}; known: {', '.join(ROWS)}")
    kept = chosen.out.with_suffix(".jsonl")
    results = kept_in(kept, asked)
    done = {(r["row"], r["concept"]) for r in results}
    options = [f"--{key}={value}" for key, value in asked.items()]
    for name in names:
        for concept in CONCEPTS:
            if (name, concept) in done:
                continue
            print(f"{name} on {concept} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, *options, "--one", name, concept]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if run.returncode:
                print(f"{name} on {concept} failed; see above", file=sys.stderr)
                continue
            results.append(json.loads(run.stdout.splitlines()[-1]))
            with kept.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
            chosen.out.write_text(table(results, asked))
    chosen.out.write_text(table(results, asked))
    print(chosen.out)


if __name__ == "__main__":
    main()
