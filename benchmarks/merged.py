"""Merging methods as composition methods: one file for N LoRAs, beside compositions that switch.

Sets of 2 to 5 concepts of the embedded world are merged by every method and drawn from the single
file, with the same seeds as the live compositions. The probe says which concepts are in a picture.

    python benchmarks/merged.py                            # writes benchmarks/merged.md
    python benchmarks/merged.py --quick                    # the same from less, in about 20 minutes
    python benchmarks/merged.py --sizes 2 --sets 1 --seeds 2 --methods svd lego --live merge
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from cmlora.adapters.merging import MERGES, merge
from cmlora.adapters.merging.method import Method
from cmlora.atomic import replacing
from cmlora.emoji.weights import GUIDANCE, STEPS
from cmlora.emoji.world import sets
from cmlora.files import read, write
from cmlora.lora import LoRA
from cmlora.pipelines.calibrate import calibrate
from cmlora.pipelines.learning import LEARNED, learn
from cmlora.pipelines.library import find
from cmlora.pipelines.models import EMBEDDED
from cmlora.pipelines.objectives import distill
from cmlora.pipelines.render import assemble

LIVE = ("naive", "merge", "switch", "composite", "cmlora", "gate")
LEARNING: Mapping[str, Mapping[str, Any]] = {
    "lorahub": {"budget": 40},
    "atlas": {"steps": 60},
    "concrete": {"steps": 100},
    "ziplora_trained": {"steps": 60},
}
QUICK: Mapping[str, Any] = {"sizes": [2, 3], "sets": 1, "seeds": 4, "learn": 0.25}
FULL: Mapping[str, Any] = {"sizes": [2, 3, 4, 5], "sets": 3, "seeds": 8, "learn": 1.0}
BATCH = 8
SIZES = (2, 3, 4, 5)


def draw(pipe: Any, prompt: str, method: str, seeds: Sequence[int]) -> list[Image.Image]:
    """One picture per seed with the LoRAs that are loaded."""
    found: list[Image.Image] = []
    for start in range(0, len(seeds), BATCH):
        some = list(seeds[start : start + BATCH])
        output = pipe(
            [prompt] * len(some),
            composition=method,
            seed=some,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
        )
        found += output.images
    return found


def judged(pictures: Sequence[Image.Image], prompt: str, names: Sequence[str]) -> dict[str, Any]:
    """Means over the pictures, and the concepts found in each."""
    from cmlora.eval.embedded import judge

    scores = judge(pictures, prompt, names)
    each = [judge([picture], prompt, names)["instances"] for picture in pictures]
    keys = ("instances", "classes", "fidelity", "clip_score")
    return {"each": each, **{key: scores.get(key) for key in keys}}


def merged(
    method: str, loras: Sequence[LoRA], rank: int | None, share: float, folder: Path
) -> tuple[LoRA, dict[str, Any]]:
    """The merged file's LoRA, and what the method says of itself."""
    started, facts = time.perf_counter(), dict[str, Any]()
    if method in LEARNED:
        pipe = assemble(EMBEDDED, [])
        objective = distill(pipe, loras, guidance_scale=GUIDANCE)
        length = {key: max(2, round(share * n)) for key, n in LEARNING[method].items()}
        done = learn(method, loras, [1.0] * len(loras), objective, rank=rank, **length)
        found, facts = done.lora, {"losses": dict(done.losses)}
    else:
        rules: Method = MERGES[method].object
        options: dict[str, Any] = {}
        if rules.needs_grams:
            pipe = assemble(EMBEDDED, [(find(x.name, model=EMBEDDED), 1.0) for x in loras])
            measured = calibrate(pipe, seeds=(0, 1), guidance_scale=GUIDANCE)
            options["grams"] = {x.name: measured.grams(x.name) for x in loras}
        result = merge(loras, [1.0] * len(loras), method, rank=rank, **options)
        found, facts = result.lora, {"kind": rules.kind, "error": result.report.error}
    path = folder / "merged.safetensors"
    write(replace(found, name="merged"), path)
    facts |= {"bytes": path.stat().st_size, "seconds": time.perf_counter() - started}
    return read(path), facts


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % of bootstrapped means."""
    chance = random.Random(seed)
    means = sorted(fmean(chance.choices(values, k=len(values))) for _ in range(2000))
    return means[50], means[1949]


def page(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """Everything as Markdown: a row per method, a column per number of concepts."""
    sizes = sorted({row["size"] for row in rows})
    heads = "".join(f" N = {size} | file |" for size in sizes)
    lines = [
        "# Merged files as compositions",
        "",
        "Share of the concepts that the probe finds, with 95 % bootstrap intervals over pictures; "
        f"{STEPS} steps, the same initial latents for every method. {ran(rows, options)} Files in "
        "units of the LoRAs they were made of; live "
        "compositions need all of them. Learned methods name the loss they reach, and in brackets "
        "the loss of the same method on random LoRAs.",
        "",
        f"| method | kind |{heads} loss |",
        f"|---|---|{'---:|---:|' * len(sizes)}---:|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        cells = [f"`{method}`", own[0].get("kind") or ("learnt" if "losses" in own[0] else "live")]
        for size in sizes:
            some = [row for row in own if row["size"] == size]
            each = [value for row in some for value in row["each"]]
            if not each:
                cells += ["", ""]
                continue
            low, high = interval(each)
            share = [row["bytes"] / row["sources"] for row in some if "bytes" in row]
            cells.append(f"{fmean(each):.0%} ({low:.0%}-{high:.0%})")
            cells.append(f"{fmean(share):.2f}" if share else "1.00")
        losses = [row["losses"] for row in own if "losses" in row]
        known = f"{fmean(x['learned'] for x in losses):.2f}" if losses else ""
        if losses and all("random" in x for x in losses):
            known += f" ({fmean(x['random'] for x in losses):.2f})"
        lines.append("| " + " | ".join([*cells, known]) + " |")
    return "\n".join([*lines, ""])


def ran(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """What the rows are made of, in words; what is missing of what was asked for is said."""
    each = {size: len({tuple(r["names"]) for r in rows if r["size"] == size}) for size in SIZES}
    counts = ", ".join(f"{n} of {size}" for size, n in each.items() if n)
    text = f"Sets of concepts: {counts}; {options.seeds} pictures of each set and method"
    if options.learn != 1:
        text += f"; learned methods had {options.learn:.0%} of their usual steps"
    if len(rows) < len(options.wanted):
        text += f"; so far {len(rows)} of {len(options.wanted)} merges and compositions"
    return f"{text}."


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row is about; rows with other settings are of other runs."""
    return row["method"], tuple(row["names"]), row["seeds"], row["learn"]


def main() -> None:
    """Draw and judge everything; what is done is kept if it is interrupted."""
    parser = argparse.ArgumentParser(description="merging methods as composition methods")
    parser.add_argument("--quick", action="store_true", help="little of it, in about 20 minutes")
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES)
    parser.add_argument("--sets", type=int, help="of every size")
    parser.add_argument("--seeds", type=int, help="pictures of every set and method")
    parser.add_argument("--learn", type=float, help="share of the usual steps of learning")
    parser.add_argument("--rank", type=int, help="of the merged files; each method's own if empty")
    parser.add_argument("--methods", nargs="*", default=[*MERGES, *LEARNED])
    parser.add_argument("--live", nargs="*", default=list(LIVE))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    store = options.out.with_suffix(".json")
    rows = json.loads(store.read_text()) if store.exists() else []
    seeds = list(range(options.seeds))
    chosen: dict[int, list[tuple[str, ...]]] = {}
    for size in options.sizes:
        every = sets(size)
        chosen[size] = random.Random(size).sample(every, min(options.sets, len(every)))
    methods = [*(f"live {m}" for m in options.live), *options.methods]
    options.wanted = {
        (method, tuple(names), options.seeds, options.learn)
        for size, some in chosen.items()
        for names in some
        for method in methods
        if method != "slerp" or size == 2
    }
    for size, some in chosen.items():
        for names in some:
            paths = [find(name, model=EMBEDDED) for name in names]
            loras = [replace(read(p), name=n) for p, n in zip(paths, names, strict=True)]
            prompt = ", ".join(lora.triggers[0] for lora in loras)
            sources = sum(path.stat().st_size for path in paths)
            for method in methods:
                facts: dict[str, Any] = {"method": method, "names": list(names), "size": size}
                facts |= {"seeds": options.seeds, "learn": options.learn}
                about = key(facts)
                if about not in options.wanted or about in {key(r) for r in rows}:
                    continue
                if method.startswith("live "):
                    pipe = assemble(EMBEDDED, [(path, 1.0) for path in paths])
                    pictures = draw(pipe, prompt, method.removeprefix("live "), seeds)
                else:
                    with tempfile.TemporaryDirectory() as folder:
                        _, more = merged(method, loras, options.rank, options.learn, Path(folder))
                        place = Path(folder) / "merged.safetensors"
                        pipe = assemble(EMBEDDED, [(place, 1.0)])
                    facts |= {**more, "sources": sources}
                    pictures = draw(pipe, prompt, "merge", seeds)
                facts |= judged(pictures, prompt, names)
                rows.append(facts)
                print(json.dumps({k: v for k, v in facts.items() if k != "each"}), flush=True)
                shown = page([r for r in rows if key(r) in options.wanted], options)
                for path, text in ((store, json.dumps(rows)), (options.out, shown)):
                    with replacing(path) as file:
                        file.write(text.encode())
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
