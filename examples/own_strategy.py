"""A composition method of your own: `python examples/own_strategy.py [MODEL LORA LORA [STEPS]]`.

A strategy does not run the model. It says, step by step, which passes to run and how their
outputs become one.
"""

import sys
from collections.abc import Sequence
from typing import Any

from cmlora import CMLoRAPipeline, compose
from cmlora.plan import Member, Pass, Plan, Policy, Step


def handover(
    step: Step, members: Sequence[Member], policy: Policy, *args: Any, **options: Any
) -> Plan:
    """The share of the first LoRA falls from 1 to 0 in the course of the run."""
    first, second = members
    passes = (Pass({first.name: first.weight}), Pass({second.name: second.weight}))
    return Plan(passes, (1 - step.fraction, step.fraction))


def main(
    model: str = "emoji",
    first: str = "character_1",
    second: str = "background_1",
    steps: str = "30",
) -> None:
    """Draw one picture with it."""
    pipe = CMLoRAPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    names = [pipe.load_lora_weights(first), pipe.load_lora_weights(second)]
    prompt = ", ".join(pipe.loras[name].applied.triggers[0] for name in names)
    with compose(pipe.pipe, names, method=handover) as active:
        made = pipe.pipe(prompt, num_inference_steps=int(steps), guidance_scale=4.0)
    made.images[0].save("own.png")
    print(f"own.png: {active.report.calls} passes")


if __name__ == "__main__":
    main(*sys.argv[1:5])
