"""From a recipe to its picture: write down everything a picture depends on, and carry it out."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from cmlora import denoisers
from cmlora.caching.foreign import canonical
from cmlora.caching.unet import Cut
from cmlora.cost import PassCost, pass_macs, shapes
from cmlora.engine import Report
from cmlora.errors import CmloraError
from cmlora.pipelines.assembly import assemble as assemble
from cmlora.pipelines.assembly import restore as restore
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.pipelines.ensemble import default_cache
from cmlora.pipelines.feasible import carrying_out, check_size
from cmlora.pipelines.native import native_guidance, native_size
from cmlora.plan import Member, Strategy
from cmlora.recipe import Companion, Ingredient, Recipe, current_versions
from cmlora.relevance import weighed
from cmlora.schedules.parse import write_schedule
from cmlora.schedules.schedule import Schedule
from cmlora.strategies import METHODS, check_options
from cmlora.strategies.auto import Choice, decide
from cmlora.strategies.former import recalled, recorded
from cmlora.strategies.options import defaults
from cmlora.updates import updates


@dataclass(frozen=True)
class Wish:
    """What a user asks for; what is left out is filled in from the model.

    Args:
        prompt: what to draw.
        method: a name from `cmlora.strategies.METHODS`.
        options: the method's own options, as values or texts.
        cache: text of a cache policy; ``None`` is the method's own.
        cut: layer and block where the cache cuts; ``None`` is the model's default.
        text_encoder: ``all``, ``none`` or ``per_lora``.
        schedule: curves on the LoRAs' weights, as text.
        uncond: ``per_lora`` or ``shared``.
        execution: ``sequential``, ``batched``, ``auto`` or ``fused``.
        threads: of the processor; 0 leaves them as they are.
        negative_prompt: what to avoid.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance; ``None`` is 7.5, or 4 for the embedded model.
        size: width and height in pixels; ``None`` is the model's.
        seed: of the initial noise.
        order: the LoRAs' names in the order of their turns; empty is by category, then by name.
    """

    prompt: str
    method: str = "cmlora"
    options: Mapping[str, Any] | None = None
    cache: str | None = None
    cut: tuple[int, int] | None = None
    text_encoder: str = "all"
    schedule: str = ""
    uncond: str = "per_lora"
    execution: str = "sequential"
    threads: int = 0
    negative_prompt: str = ""
    steps: int = 30
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None
    seed: int = 0
    order: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """A picture, how it was made, and what making it took."""

    image: Image.Image
    recipe: Recipe
    report: Report


def write_recipe(pipe: CMLoRAPipeline, wish: Wish) -> Recipe:
    """Everything that determines the picture, before it is rendered.

    Args:
        pipe: the model, with the LoRAs that take part loaded.
        wish: what is asked for.

    Raises:
        CmloraError: for a wish that cannot be fulfilled.
    """
    if not wish.prompt.strip():
        raise CmloraError("there is no prompt; say what to draw")
    METHODS[wish.method]
    wish, chosen = settled(pipe, wish)
    factors = chosen.weights
    loras = pipe.ensemble.weights()
    cache = default_cache(wish.method, pipe.pipe, loras) if wish.cache is None else wish.cache
    width, height = _size(pipe, wish)
    options = check_options(wish.method, wish.options or {})
    weights = {name: weight * factors.get(name, 1.0) for name, weight in loras.items()}
    members: Sequence[Member] = pipe.ensemble.members(weights)
    members = weighed(pipe.pipe, wish.method, options, wish.prompt, members)
    guidance = native_guidance(pipe) if wish.guidance_scale is None else wish.guidance_scale
    return Recipe(
        model=str(pipe.ensemble.source),
        model_hash=pipe.ensemble.fingerprint,
        loras=tuple(
            Ingredient(
                name=member.name,
                file=lora.path.name,
                sha256=lora.applied.sha256,
                weight=member.weight,
                role=member.role,
                category=lora.applied.category,
                frequency=member.frequency,
                window=member.window,
                scope=member.scope,
                relevance=member.relevance,
                importance=member.importance,
                into=lora.into,
                config=lora.applied.config,
                companions=tuple(
                    Companion(each.path.name, each.applied.sha256, each.into, each.weight)
                    for each in lora.further
                ),
            )
            for member in members
            for lora in [pipe.loras[member.name]]
        ),
        order=wish.order or chosen.order or _turns(tuple(loras)),
        method=wish.method,
        options=recorded(wish.method, options, defaults(METHODS[wish.method].object)),
        schedule=write_schedule(_checked_schedule(pipe, wish.schedule)),
        uncond=wish.uncond,
        execution=wish.execution,
        threads=wish.threads,
        cache=canonical(cache),
        cut=wish.cut,
        text_encoder=wish.text_encoder,
        prompt=wish.prompt,
        negative_prompt=wish.negative_prompt,
        steps=wish.steps,
        guidance_scale=guidance,
        width=width,
        height=height,
        seed=wish.seed,
        scheduler=type(pipe.scheduler).__name__,
        scheduler_config=_public(pipe.scheduler.config),
        dtype=str(pipe.dtype).removeprefix("torch."),
        versions=current_versions(),
    )


def settled(pipe: CMLoRAPipeline, wish: Wish) -> tuple[Wish, Choice]:
    """What method "auto" comes to for a wish.

    Args:
        pipe: the model, with the LoRAs that take part loaded.
        wish: what is asked for.

    Returns:
        the wish with a method, options and cache in place of "auto", and the choice with its
        reason, order of turns and factors on the LoRAs' weights. Any other wish as it is, with a
        choice that says nothing else.
    """
    if wish.method != "auto":
        return wish, Choice(wish.method)
    options = check_options("auto", wish.options or {})
    everyone = pipe.ensemble.members(pipe.ensemble.weights())
    members = [member for member in everyone if member.weight != 0] or everyone
    known = updates(denoisers.find(pipe.pipe).values(), [member.name for member in members])
    cacheable = default_cache("cmlora", pipe.pipe, pipe.ensemble.weights()) != "none"
    chosen = decide(known, options, members, wish.steps, cacheable=cacheable)
    silent = [member.name for member in everyone if member.name not in chosen.order]
    chosen = replace(chosen, order=(*chosen.order, *silent))
    settled_wish = replace(
        wish,
        method=chosen.method,
        options=chosen.options,
        cache=chosen.cache if wish.cache is None else wish.cache,
        uncond=chosen.uncond if wish.uncond == "per_lora" else wish.uncond,
    )
    return settled_wish, chosen


def _turns(order: tuple[str, ...]) -> tuple[str, ...]:
    """An order as recipes keep it, where none is by name."""
    return () if list(order) == sorted(order) else order


def _checked_schedule(pipe: CMLoRAPipeline, text: str) -> Schedule:
    """A schedule that names no other LoRAs than those that are composed."""
    schedule = pipe.ensemble.schedule(text)
    schedule.check(list(pipe.loras))
    return schedule


def render(
    pipe: CMLoRAPipeline,
    recipe: Recipe,
    *,
    on_step: Callable[[], None] = lambda: None,
    on_latents: Callable[[int, Any], None] = lambda index, latents: None,
    strategy: Strategy | None = None,
) -> Rendered:
    """Carry a recipe out in a pipeline that has its LoRAs.

    The picture is made alone, from its own seed: no other picture has a part in its bits.

    Args:
        pipe: see `restore`.
        recipe: what to make.
        on_step: called after every denoising step.
        on_latents: called after every denoising step with its index and the latents (B, C, H, W),
            which it may look at and not change.
        strategy: carried out in place of the method of that name, with the same options; one that
            measures what the method does while it does it.

    Raises:
        CmloraError: if the engine or the scheduler refuses it, or the memory is not enough.
    """
    weights = {lora.name: lora.weight for lora in recipe.loras}
    for lora in recipe.loras:
        _check_config(lora, pipe)
    known = {member.name: member for member in pipe.ensemble.members(weights)}
    members = [
        replace(
            known[lora.name],
            role=lora.role,
            frequency=lora.frequency,
            window=lora.window,
            scope=lora.scope,
            relevance=lora.relevance,
            importance=lora.importance,
        )
        for lora in recipe.turns()
    ]

    def stepped(_: Any, index: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        on_step()
        on_latents(index, values.get("latents"))
        return values

    with threads(recipe.threads), carrying_out(recipe):
        output = pipe(
            recipe.prompt,
            **_guided(pipe.pipe, recipe),
            **_still(pipe.pipe),
            composition=recipe.method if strategy is None else strategy,
            lora_weights=weights,
            members=members,
            cache=recipe.cache,
            cut=None if recipe.cut is None else Cut(*recipe.cut),
            text_encoder=recipe.text_encoder,
            schedule=recipe.schedule,
            uncond=recipe.uncond,
            execution=recipe.execution,
            composition_options=recalled(recipe.method, recipe.options),
            seed=[recipe.image_seed()],
            num_inference_steps=recipe.steps,
            width=recipe.width,
            height=recipe.height,
            callback_on_step_end=stepped,
            output_type="pil",
        )
    return Rendered(_first(output), recipe, output.report)


def _check_config(lora: Ingredient, pipe: CMLoRAPipeline) -> None:
    """See that a LoRA's strength comes from the same configuration as in its recipe."""
    loaded = pipe.loras.get(lora.name)
    if loaded is None or loaded.applied.config == lora.config:
        return
    theirs = f"sha256 {lora.config[:12]}" if lora.config else "none"
    ours = f"sha256 {loaded.applied.config[:12]}" if loaded.applied.config else "none"
    raise CmloraError(
        f"LoRA {lora.file or lora.name}: its strength comes from the adapter_config.json beside "
        f"it, and that is not the recipe's (there {theirs}, here {ours}); put the one that it came "
        "with beside it"
    )


def pass_cost(pipe: CMLoRAPipeline, recipe: Recipe) -> PassCost | None:
    """Cost of a pass, both guidance branches; ``None`` for a denoiser that cannot be counted."""
    unet: Any = getattr(pipe.pipe, "unet", None)
    if type(unet).__name__ != "UNet2DConditionModel":
        return None
    sample, encoder = shapes(
        unet.config,
        recipe.height,
        recipe.width,
        batch=2 if recipe.guidance_scale > 1 else 1,
        scale=pipe.vae_scale_factor,
        tokens=pipe.tokenizer.model_max_length,
    )
    return pass_macs(unet, sample, encoder, cut=None if recipe.cut is None else Cut(*recipe.cut))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with a number of processor threads; 0 leaves them as they are."""
    before = torch.get_num_threads()
    try:
        if count:
            torch.set_num_threads(count)
        yield
    finally:
        if count:
            torch.set_num_threads(before)


def _size(pipe: CMLoRAPipeline, wish: Wish) -> tuple[int, int]:
    """The picture's width and height, refused if the model cannot make it."""
    size = wish.size or native_size(pipe.pipe)
    check_size(pipe.pipe, size)
    return size


def _guided(pipe: Any, recipe: Recipe) -> dict[str, Any]:
    """Guidance as the pipeline's family takes it."""
    row = denoisers.kind(next(iter(denoisers.find(pipe).values())))
    said: dict[str, Any] = {row.guidance: recipe.guidance_scale}
    if "negative_prompt" in inspect.signature(pipe.__call__).parameters:
        said["negative_prompt"] = recipe.negative_prompt or None
    elif recipe.negative_prompt:
        raise CmloraError(f"{type(pipe).__name__} takes no negative prompt; leave it out")
    return said


def _still(pipe: Any) -> dict[str, Any]:
    """A pipeline for video makes one frame, which is a picture."""
    return {"num_frames": 1} if "num_frames" in inspect.signature(pipe.__call__).parameters else {}


def _first(output: Any) -> Image.Image:
    """The picture of an output, or the only frame of its video."""
    pictures = output.frames[0] if hasattr(output, "frames") else output.images
    picture: Image.Image = pictures[0]
    return picture


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration without diffusers' private entries."""
    # infinity, the default of DPM-Solver's lambda_min_clipped, has no JSON form and comes back
    # as the default when it is left out
    return {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and not (isinstance(value, float) and math.isinf(value))
    }
