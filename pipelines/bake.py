"""Any composition as one LoRA: the nearest one, and how near that is on the denoiser itself."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cmlora.adapters.merging.atlas import atlas
from cmlora.adapters.merging.check import check_rank
from cmlora.adapters.merging.learn import descend
from cmlora.adapters.merging.written import inherited
from cmlora.adapters.objective import Answers, Question, answer
from cmlora.errors import CmloraError
from cmlora.files import read
from cmlora.lora import DENOISERS, LoRA, Update, stack
from cmlora.pipelines.calibrate import parts
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.pipelines.objectives import recording, scaled, silent
from cmlora.pipelines.render import render
from cmlora.recipe import Recipe

FIT = ("none", "strengths", "factors")
"""How much of the LoRA is free: nothing, one strength per LoRA and module, or every number."""


@dataclass(frozen=True)
class Baked:
    """A composition as one LoRA.

    Distances are root mean squares over the denoiser's answers at the composition's own latents,
    relative to how far the composition moves them from those of the model alone, which is 1.
    They are measured at another seed than the LoRA was fitted to.

    Args:
        lora: what `cmlora.files.write` writes.
        distance: of the LoRA.
        steps: the same, step by step.
        merged: of the LoRAs added up at their weights, for comparison.
        started: of their mean, where the strengths began.
    """

    lora: LoRA
    distance: float
    steps: tuple[float, ...]
    merged: float
    started: float


def bake(
    pipe: CMLoRAPipeline,
    recipe: Recipe,
    *,
    rank: int | None = None,
    fit: str = "factors",
    steps: int = 60,
    rate: float | None = None,
    name: str = "baked",
    on_step: Callable[[], None] = lambda: None,
) -> Baked:
    """The LoRA whose answers are nearest to a composition's, in the mean over its steps.

    The composition runs with one seed to be followed and with another one to be measured at. The
    fit begins at the nearest of the sum of all LoRAs at their weights, their mean, and the mean
    with one strength found per LoRA and module, then moves the factors themselves; the best of what
    was seen is kept. One LoRA is the same in all steps, so that a schedule can be met only on
    average: the distance says how well.

    Args:
        pipe: with the recipe's LoRAs loaded, see `cmlora.pipelines.render.restore`.
        recipe: the composition.
        rank: the largest rank of a module; the sum of the ranks if not given.
        fit: one of `FIT`.
        steps: of learning, for each of both stages.
        rate: of learning the factors; by default a hundredth of their mean size.
        name: of the result.
        on_step: called after every step of learning.

    Raises:
        CmloraError: if the recipe has no LoRA, or its composition is the model alone.
    """
    if fit not in FIT:
        raise CmloraError(f"fit is {fit!r}, expected {', '.join(FIT)}")
    if not recipe.loras:
        raise CmloraError("this recipe has no LoRA; there is nothing to bake")
    for x in recipe.loras:
        if x.companions or x.into not in ((), ("transformer",)):
            raise CmloraError(
                f"LoRA {x.name!r} of this recipe is in several denoisers; a baked LoRA is for one"
            )
    loras = [
        replace(scaled(read(pipe.loras[x.name].path), _strength(x.weight)), name=x.name)
        for x in recipe.loras
        if x.weight
    ]
    modules = sorted({module for lora in loras for module in lora.updates})
    check_rank(rank, [[x.updates[m] for x in loras if m in x.updates] for m in modules])
    live = [_record(pipe, replace(recipe, seed=seed)) for seed in _seeds(recipe.seed)]
    with silent(pipe):
        followed, held_out = (_answers(pipe, recipe, calls) for calls in live)
        best, held = _nearest(
            loras, followed, held_out, rank=rank, fit=fit, steps=steps, rate=rate, on_step=on_step
        )
    start = f"{followed.component}."
    text = [(_only(lora, start, inside=False), 1.0) for lora in loras]
    spoken = stack(text, "text").updates if recipe.text_encoder == "all" else {}
    if rank is not None:
        spoken = {module: update.truncate(rank) for module, update in spoken.items()}
    told = LoRA(
        name,
        {**best.updates, **spoken},
        {
            **inherited(loras),
            "modelspec.merged_from": ",".join(x.name for x in loras),
            "cmlora.baked": json.dumps(_told(recipe), sort_keys=True),
        },
        tuple(dict.fromkeys(word for lora in loras for word in lora.triggers)),
    )
    return Baked(told, **held)


def _nearest(
    loras: Sequence[LoRA],
    followed: Answers,
    held_out: Answers,
    *,
    rank: int | None,
    fit: str,
    steps: int,
    rate: float | None,
    on_step: Callable[[], None],
) -> tuple[LoRA, dict[str, Any]]:
    """The denoiser's part, and its distances at the other seed."""
    inside = [_only(lora, f"{followed.component}.") for lora in loras]
    inside = [lora for lora in inside if lora.updates]
    if not inside:
        raise CmloraError(f"the LoRAs of this recipe do not change the {followed.component}")
    share = 1 / len(inside)
    mean = stack([(lora, share) for lora in inside], "mean")
    everyone = stack([(lora, 1.0) for lora in inside], "sum")
    candidates = [x if rank is None else x.truncate(rank) for x in (everyone, mean)]
    if fit != "none":
        strengths = atlas(
            inside,
            followed.loss,
            steps=steps,
            rate=0.05,
            start=share,
            control=False,
            on_step=on_step,
        ).lora
        candidates.append(strengths if rank is None else strengths.truncate(rank))
    best = min(candidates, key=followed.value)
    if fit == "factors":
        best = _fitted(best, followed, steps, rate, on_step)
    each = [replace(held_out, questions=[question]) for question in held_out.questions]
    return best, {
        "distance": held_out.value(best) ** 0.5,
        "steps": tuple(one.value(best) ** 0.5 for one in each),
        "merged": held_out.value(everyone) ** 0.5,
        "started": held_out.value(mean) ** 0.5,
    }


def _fitted(
    lora: LoRA,
    objective: Answers,
    steps: int,
    rate: float | None,
    on_step: Callable[[], None],
) -> LoRA:
    """The LoRA with all its numbers free."""
    flat = {m: u.folded() for m, u in lora.updates.items()}
    factors = {
        module: [
            (u.up * u.scale).detach().float().clone().requires_grad_(True),
            u.down.detach().float().clone().requires_grad_(True),
        ]
        for module, u in flat.items()
    }
    trained = [tensor for both in factors.values() for tensor in both]
    usual = float(torch.cat([t.detach().abs().flatten() for t in trained]).mean())

    def now() -> LoRA:
        return replace(lora, updates={m: Update(d, u) for m, (u, d) in factors.items()})

    def losses_of() -> tuple[Tensor, Tensor]:
        found = objective.loss(now())
        return found, found

    best, _ = descend(
        trained, losses_of, steps=steps, rate=usual / 100 if rate is None else rate, on_step=on_step
    )
    pairs = zip(best[::2], best[1::2], strict=True)
    updates = {m: Update(down, up) for m, (up, down) in zip(factors, pairs, strict=True)}
    return replace(lora, updates=updates)


def _record(pipe: CMLoRAPipeline, recipe: Recipe) -> list[tuple[dict[str, Any], Tensor]]:
    """What the live composition is asked and answers."""
    with recording(parts(pipe.pipe)[_component(pipe)]) as calls:
        render(pipe, recipe)
    return calls


def _answers(
    pipe: CMLoRAPipeline, recipe: Recipe, calls: Sequence[tuple[dict[str, Any], Tensor]]
) -> Answers:
    """The same as questions to the model without LoRAs."""
    component = _component(pipe)
    denoiser = parts(pipe.pipe)[component].requires_grad_(False)
    with torch.no_grad():
        gaps = [wanted - answer(denoiser, call) for call, wanted in calls]
    # One size for all: a step that is hardly moved must not count as much as the others.
    size = float(torch.stack([gap.square().mean() for gap in gaps]).mean())
    if not size > 0:
        raise CmloraError(f"{recipe.method} of this recipe is the model alone")
    return Answers(denoiser, component, [Question(call, wanted, size) for call, wanted in calls])


def _component(pipe: CMLoRAPipeline) -> str:
    return next(name for name in parts(pipe.pipe) if name in DENOISERS)


def _strength(weight: Any) -> float:
    """A LoRA's weight; a schedule of weights counts as 1, which the fit then changes."""
    return float(weight) if isinstance(weight, int | float) else 1.0


def _seeds(seed: int) -> tuple[int, int]:
    return seed, (seed + 1) % 2**32


def _only(lora: LoRA, start: str, *, inside: bool = True) -> LoRA:
    chosen = {m: u for m, u in lora.updates.items() if m.startswith(start) == inside}
    return replace(lora, updates=chosen)


def _told(recipe: Recipe) -> Mapping[str, Any]:
    return {
        "method": recipe.method,
        "options": dict(recipe.options),
        "cache": recipe.cache,
        "loras": [{"name": x.name, "sha256": x.sha256, "weight": x.weight} for x in recipe.loras],
        "model_hash": recipe.model_hash,
        "prompt": recipe.prompt,
        "steps": recipe.steps,
        "guidance_scale": recipe.guidance_scale,
    }
