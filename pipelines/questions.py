"""Calls of a denoiser as they happen in a pipeline, to be asked again of other models."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from cmlora.adapters.compression.heal import Call
from cmlora.adapters.objective import answer
from cmlora.lora import DENOISERS
from cmlora.pipelines.calibrate import parts
from cmlora.pipelines.whole import asked

STEPS = 4
SPREAD = 4
Kept = TypeVar("Kept")


def questions(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int = STEPS,
    spread: int = SPREAD,
    seed: int = 0,
    **arguments: Any,
) -> list[Call]:
    """What the denoiser is asked while a pipeline draws.

    Each prompt begins at another step and goes on in strides, so that together they ask at many
    noise levels: a model trained on a few of them may answer better there and worse elsewhere.

    Args:
        pipe: a diffusers pipeline.
        prompts: each is drawn once.
        steps: denoising steps per prompt that are kept.
        spread: so many times as many steps are made.
        seed: of the first prompt; each next one has the next. Seeds of 0 and 1 keep other steps of
            the same prompt.
        arguments: for the pipeline's call.
    """
    models = parts(pipe)
    denoiser = next(models[name] for name in DENOISERS if name in models)
    found = []
    for index, text in enumerate(prompts):
        noise = torch.Generator("cpu").manual_seed(seed + 1000 * index)
        with asked(denoiser) as calls, torch.no_grad():
            pipe(
                text,
                num_inference_steps=steps * spread,
                generator=noise,
                output_type="latent",
                **arguments,
            )
        found += strided(calls, steps, spread, index + seed * (spread // 2))
    return [_call(call) for call in found]


def strided(calls: Sequence[Kept], steps: int, spread: int, phase: int) -> list[Kept]:
    """The calls of every ``spread``-th denoising step.

    Args:
        calls: of ``steps * spread`` denoising steps, one or two for each.
        steps: that are kept.
        spread: the stride.
        phase: which step is the first, modulo the stride.
    """
    each = max(1, round(len(calls) / (steps * spread)))  # two where guidance takes two
    return [call for at, call in enumerate(calls) if at // each % spread == phase % spread]


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
