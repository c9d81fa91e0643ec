"""Calls of a denoiser as they happen in a pipeline, to be asked again of other models."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cmlora.adapters.compression.heal import Call
from cmlora.adapters.objective import answer
from cmlora.lora import DENOISERS
from cmlora.pipelines.calibrate import parts
from cmlora.pipelines.whole import asked

STEPS = 4


def questions(
    pipe: Any, prompts: Sequence[str], *, steps: int = STEPS, seed: int = 0, **arguments: Any
) -> list[Call]:
    """What the denoiser is asked while a pipeline draws.

    Args:
        pipe: a diffusers pipeline.
        prompts: each is drawn once.
        steps: denoising steps per prompt.
        seed: of the first prompt; each next one has the next.
        arguments: for the pipeline's call.
    """
    models = parts(pipe)
    denoiser = next(models[name] for name in DENOISERS if name in models)
    with asked(denoiser) as calls, torch.no_grad():
        for index, text in enumerate(prompts):
            noise = torch.Generator("cpu").manual_seed(seed + 1000 * index)
            pipe(
                text, num_inference_steps=steps, generator=noise, output_type="latent", **arguments
            )
    return [_call(call) for call in calls]


def away(model: nn.Module, original: nn.Module, calls: Sequence[Call]) -> float:
    """Root mean square difference of the answers over that of the original's answers."""
    lost = size = 0.0
    with torch.no_grad():
        for call in calls:
            wanted = call(original)
            lost += float((call(model) - wanted).square().sum())
            size += float(wanted.square().sum())
    return (lost / size) ** 0.5 if size else 0.0


def _call(arguments: dict[str, Any]) -> Call:
    return lambda model: answer(model, arguments)
