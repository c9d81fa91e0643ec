"""What compressing a denoiser costs: answers, size, and what its pictures still show.

Every method is tried at several sizes, evenly and with the bytes spread over the layers, and again
after healing. Factors are also made of a model that was steered towards low rank before (TRP), and
cut from larger ones that were sorted by nested training (Maestro). On the embedded model the probe
says how much of what the prompts ask for is in the pictures; other models have no such judge.

    python benchmarks/compression.py                       # writes benchmarks/compression.md
    python benchmarks/compression.py --quick               # two sizes, less learning: an hour
    python benchmarks/compression.py --model path --prompts "a cat" --keep 0.7 --heal 2 --out x.md
    python benchmarks/compression.py --methods svd rocket+knapsack svd+steer --out x.md
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from cmlora.adapters.calibration import grams
from cmlora.adapters.compression import COMPRESSIONS, RULES
from cmlora.adapters.compression.heal import Call, blocks, heal
from cmlora.adapters.compression.maestro import cut, nest
from cmlora.adapters.compression.model import compress, model_bytes
from cmlora.adapters.compression.trp import steer
from cmlora.atomic import replacing
from cmlora.emoji.weights import GUIDANCE
from cmlora.errors import CmloraError
from cmlora.pipelines.models import EMBEDDED, open_pipeline
from cmlora.pipelines.questions import away, questions

Variant = tuple[str, str, str]
VARIANTS: tuple[Variant, ...] = (
    ("svd", "", ""),
    ("svd", "budget", ""),
    ("svd", "welore", ""),
    ("svd", "knapsack", ""),
    ("trp", "", "steer"),
    ("svd", "", "nest"),
    ("lord", "", ""),
    ("rocket", "", ""),
    ("rocket", "knapsack", ""),
    ("cospadi", "", ""),
    ("mxfp4", "", ""),
)
"""Method, how the bytes are spread over the layers, and what is learnt beside healing."""
LEARNT = ("steer", "nest")
SETTINGS = ("model", "heal", "steer", "nest", "scenes")
WIDEST = 0.95
"""Share of the bytes of the factors that are sorted, and cut after that."""
FULL: dict[str, Any] = {
    "keep": [0.9, 0.8, 0.7, 0.6, 0.5],
    "heal": 200,
    "steer": 100,
    "nest": 200,
    "scenes": 64,
}
QUICK: dict[str, Any] = {"keep": [0.8, 0.6], "heal": 40, "steer": 10, "nest": 20, "scenes": 16}


def prompts_of(given: Sequence[str], model: str) -> list[str]:
    """What the inputs are measured at: prompts of training scenes on the embedded model."""
    if given or model != EMBEDDED:
        return list(given)
    import numpy as np

    from cmlora.emoji.report import plainly
    from cmlora.emoji.scenes import sample

    found = []
    for index in range(8):
        rng = np.random.default_rng((5, index))  # of no test scene
        found.append(plainly(sample(rng), rng))
    return found


def accuracy(pipe: Any, model: str, count: int) -> float | None:
    """Share of elements that the probe finds where the prompt asks for them."""
    if model != EMBEDDED or not count:
        return None
    from cmlora.emoji import probe
    from cmlora.emoji.report import base_accuracy

    marks, _ = base_accuracy(pipe, probe.load(), count)
    return fmean(marks.values())


def row(
    pipe: Any,
    original: nn.Module,
    asked: Sequence[Call],
    checked: Sequence[Call],
    options: argparse.Namespace,
    variant: Variant,
    keep: float,
) -> list[dict[str, Any]]:
    """One method at one size: before and after healing."""
    method, spread, learnt = variant
    model = copy.deepcopy(original)
    if learnt == "steer":
        steer(model, original, asked, options.steer)
    moments = grams(model, lambda: [call(model) for call in asked])
    rule: Any = spread if spread == "knapsack" else RULES[spread].object if spread else None
    try:
        share = max(WIDEST, keep) if learnt == "nest" else keep
        compress(model, COMPRESSIONS[method].object, share, moments, rule=rule)
        if learnt == "nest":
            nest(model, original, asked, options.nest)
            cut(model, keep / share)
    except CmloraError as mistake:
        return [{**about(variant, keep, options), "healed": 0, "no": str(mistake)}]
    found = []
    for steps in (0, options.heal):
        if steps and method != "mxfp4":  # nothing in it can be trained
            heal(model, original, asked, steps, features=blocks(model))
        elif steps:
            continue
        pipe.unet = model
        found.append(
            {
                **about(variant, keep, options),
                "healed": steps,
                "share": model_bytes(model) / model_bytes(original),
                "away": away(model, original, checked),
                "accuracy": accuracy(pipe, options.model, options.scenes),
            }
        )
    pipe.unet = original
    return found


def about(variant: Variant, keep: float, options: argparse.Namespace) -> dict[str, Any]:
    """What a row is about; rows with other settings are of other runs."""
    named = dict(zip(("method", "spread", "learnt"), variant, strict=True))
    return {**named, "keep": keep, **{key: getattr(options, key) for key in SETTINGS}}


def parsed(word: str) -> Variant:
    """A method with how it is spread or what is learnt, such as ``svd+welore`` or ``svd+steer``."""
    method, *more = word.split("+")
    spread = next((part for part in more if part not in LEARNT), "")
    return method, spread, next((part for part in more if part in LEARNT), "")


def page(rows: Sequence[dict[str, Any]], options: argparse.Namespace, base: float | None) -> str:
    """Everything as Markdown."""
    keys = ("method", "spread", "learnt", "keep")
    known = "" if base is None else f" The original shows {base:.1%} of what prompts ask for."
    lines = [
        "# Compression of a denoiser",
        "",
        f"`python benchmarks/compression.py --model {options.model}`; healing takes {options.heal} "
        f"steps, steering {options.steer}, nesting {options.nest}. Away is the root mean square "
        "distance of the answers, at other noise and for every prompt at other noise levels, "
        "from the original's, relative to them; accuracy is "
        f"over {options.scenes} scenes.{known} "
        f"{len({tuple(r[key] for key in keys) for r in rows})} of {options.count} "
        "combinations of method and size have been run.",
        "",
        "| kept | method | spread | learnt | bytes | away | accuracy | away, healed "
        "| accuracy, healed |",
        "|---:|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for own in sorted((r for r in rows if not r["healed"]), key=lambda r: -r["keep"]):
        name = f"| {own['keep']:.0%} | `{own['method']}` | {own['spread'] or 'evenly'} "
        name += f"| {own['learnt'] or '-'} "
        if "no" in own:
            lines.append(f"{name}| - | {own['no']} | | | |")
            continue
        healed = [r for r in rows if r["healed"] and all(r[k] == own[k] for k in keys)]
        cells = [f"{own['share']:.1%}", *_numbers(own)]
        cells += _numbers(healed[0]) if healed else ["", ""]
        lines.append(f"{name}| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _numbers(own: dict[str, Any]) -> list[str]:
    seen = own["accuracy"]
    return [f"{own['away']:.1%}", "" if seen is None else f"{seen:.1%}"]


def main() -> None:
    """Measure every method and write the page; what is done is kept if it is interrupted."""
    parser = argparse.ArgumentParser(description="compression of a denoiser")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--prompts", nargs="*", default=[])
    parser.add_argument("--quick", action="store_true", help="little of it, in about an hour")
    parser.add_argument("--keep", nargs="+", type=float)
    parser.add_argument(
        "--methods", nargs="+", default=[], help="such as rocket+knapsack, svd+steer"
    )
    parser.add_argument("--heal", type=int)
    parser.add_argument("--steer", type=int, help="steps before factoring")
    parser.add_argument("--nest", type=int, help="steps that sort the factors")
    parser.add_argument("--scenes", type=int)
    parser.add_argument("--steps", type=int, default=4, help="denoising steps per prompt")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    wanted = [parsed(word) for word in options.methods] or list(VARIANTS)
    options.count = len(wanted) * len(options.keep)
    pipe = open_pipeline(options.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    texts = prompts_of(options.prompts, options.model)
    scale: dict[str, Any] = {"guidance_scale": GUIDANCE} if options.model == EMBEDDED else {}
    asked, checked = (
        questions(pipe, texts, steps=options.steps, seed=seed, **scale) for seed in (0, 1)
    )
    original = pipe.unet
    store = options.out.with_suffix(".json")
    rows = json.loads(store.read_text()) if store.exists() else []
    base = accuracy(pipe, options.model, options.scenes)
    for keep in options.keep:
        for variant in wanted:
            own = about(variant, keep, options)
            if any(own.items() <= r.items() for r in rows):
                continue
            new = row(pipe, original, asked, checked, options, variant, keep)
            rows += new
            for found in new:
                print(json.dumps(found), flush=True)
            same = [r for r in rows if all(r.get(k) == own[k] for k in SETTINGS)]
            shown = page([r for r in same if r["keep"] in options.keep], options, base)
            for path, text in ((store, json.dumps(rows)), (options.out, shown)):
                with replacing(path) as file:
                    file.write(text.encode())
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
