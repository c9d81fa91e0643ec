"""Whether a cache saves the time that its multiply-accumulates promise.

Cached `cmlora` against uncached `composite`, five LoRAs on the embedded model, runs alternating so
that the machine's moods hit both alike.

    python benchmarks/cache.py --repeats 5
"""

import argparse
import json
from statistics import median

from cmlora.cost import PassCost
from cmlora.emoji.weights import STEPS
from cmlora.emoji.world import BY_CONCEPT
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.pipelines.render import Rendered, Wish, pass_cost, render, write_recipe

LORAS = ("character_1", "clothing_1", "style_1", "background_1", "object_1")


def main() -> None:
    """Print seconds and multiply-accumulates of both, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    pipe = CMLoRAPipeline.from_pretrained("emoji")
    pipe.set_progress_bar_config(disable=True)
    for name in LORAS:
        pipe.load_lora_weights(name)
    prompt = ", ".join(BY_CONCEPT[name].trigger for name in LORAS)
    runs = {
        "composite": Wish(prompt, method="composite", cache="none", steps=chosen.steps),
        "cmlora": Wish(prompt, method="cmlora", cache="nonuniform", steps=chosen.steps),
    }
    recipes = {name: write_recipe(pipe, wish) for name, wish in runs.items()}
    cost = pass_cost(pipe, recipes["composite"])
    assert cost is not None
    made: dict[str, list[Rendered]] = {name: [] for name in runs}
    for _ in range(chosen.repeats + 1):
        for name, recipe in recipes.items():
            made[name].append(render(pipe, recipe))
    lines = {name: line(pictures[1:], cost) for name, pictures in made.items()}
    ratios = {
        key: lines["cmlora"][key] / lines["composite"][key] for key in ("seconds", "gmacs")
    } | {"light_to_full_macs": cost.ratio}
    if chosen.json:
        print(json.dumps({**lines, "ratio": ratios}, indent=2))
        return
    print(f"{'':10} {'full':>5} {'light':>5} {'GMACs':>8} {'seconds':>8}")
    for name, row in lines.items():
        print(
            f"{name:10} {row['full']:5.0f} {row['light']:5.0f} "
            f"{row['gmacs']:8.1f} {row['seconds']:8.3f}"
        )
    print(f"{'ratio':10} {'':5} {'':5} {ratios['gmacs']:8.3f} {ratios['seconds']:8.3f}")


def line(pictures: list[Rendered], cost: PassCost) -> dict[str, float]:
    """Median seconds and the passes of runs that were all alike; the first was left out."""
    report = pictures[0].report
    return {
        "full": sum(report.full.values()),
        "light": sum(report.light.values()),
        "gmacs": cost.of(report.full, report.light) / 1e9,
        "seconds": median(picture.report.seconds for picture in pictures),
    }


if __name__ == "__main__":
    main()
