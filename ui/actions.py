"""Pictures from orders and from recipes: what the Generate page does, without the page."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmlora.errors import CmloraError
from cmlora.recipe import Recipe, from_png, save_png
from cmlora.ui.forms import fields_of
from cmlora.ui.jobs import Clock, Event, Progress, Result, Ticket, stream
from cmlora.ui.jobs import Report as Tell
from cmlora.ui.order import Order, check, check_strengths, with_tags
from cmlora.ui.previews import Previewer, data_uri
from cmlora.ui.settings import Limits
from cmlora.ui.studio import Studio, without_path

if TYPE_CHECKING:
    from cmlora.engine import Report
    from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
    from cmlora.pipelines.render import Wish
    from cmlora.plan import Strategy

_PREVIEW_EVERY = 0.2  # seconds; more often than that nobody sees it
_PREVIEW_SHARE = 8  # times as long as a preview takes, nothing is drawn after it


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Args:
        path: its PNG in the output folder; the recipe is inside.
        recipe: what it was made from.
        report: what making it took.
        macs: multiply-accumulates of the denoiser; ``None`` if they cannot be counted.
    """

    path: Path
    recipe: Recipe
    report: Report
    macs: int | None


def generate(studio: Studio, order: Order, ticket: Ticket) -> Iterator[Event]:
    """Make the pictures of an order.

    Args:
        studio: the server's.
        order: what is asked for.
        ticket: stops the work.

    Yields:
        `Progress` on the way and a `Result` with a `Picture` for each one that is finished.

    Raises:
        CmloraError: if the order cannot be fulfilled; `Stopped` if it is not wanted any more.
    """
    order = complete(studio, order)

    def work(tell: Tell) -> None:
        tell(Progress(0, order.steps * order.pictures, _opening(studio, order.model)))
        with studio.pipeline(order.model, order.loras, order.sampler, order.scopes) as pipe:
            ticket.check()
            recipe = recipe_of(pipe, order, ticket, tell, studio.settings.out)
            clock = Clock(order.steps * order.pictures)
            for index in range(order.pictures):
                words = f"picture {index + 1} of {order.pictures}" if order.pictures > 1 else ""
                one = replace(recipe, index=index)
                tell(Result(paint(studio, pipe, one, ticket, tell, clock, words)))

    return stream(work, ticket)


def replay(studio: Studio, path: str | Path, model: str, ticket: Ticket) -> Iterator[Event]:
    """Make the picture in a PNG again from the recipe in it.

    Args:
        studio: the server's.
        path: of the PNG, which a visitor sent.
        model: the model that is selected on the page.
        ticket: stops the work.

    Yields:
        as `generate`.

    Raises:
        CmloraError: if the file holds no recipe, asks for more than the server allows, or needs
            a model or a LoRA that is not here.
    """
    recipe = read_recipe(path, studio.settings.limits)

    def work(tell: Tell) -> None:
        tell(Progress(0, recipe.steps, "loading what the recipe names"))
        with studio.replaying(recipe, model) as pipe:
            ticket.check()
            tell(Result(paint(studio, pipe, recipe, ticket, tell, Clock(recipe.steps), "again")))

    return stream(work, ticket)


def complete(studio: Studio, order: Order) -> Order:
    """The order checked, with the LoRAs its prompt names and without the names.

    Raises:
        CmloraError: for anything that is unknown or beyond a limit.
    """
    limits = studio.settings.limits
    order = check(order, limits)
    studio.model_place(order.model)
    order = with_tags(order, studio.lora_paths(order.model))
    for name in (*order.loras, *order.scopes):
        studio.lora_path(name, order.model)
    order = replace(order, loras=check_strengths(order.loras, limits))
    if not order.loras and order.method != "naive":
        raise CmloraError(
            "no LoRA is selected; select one or more, or choose the method naive, which needs none"
        )
    return order


def read_recipe(path: str | Path, limits: Limits) -> Recipe:
    """The recipe in a picture that a visitor sent, within the server's bounds.

    Raises:
        CmloraError: if the file is too large or holds no recipe, or the recipe asks for too much.
    """
    path = Path(path)
    try:
        if path.stat().st_size > limits.png:
            raise CmloraError(f"{path.name} has more than {limits.png // 2**20} MB")
        recipe = from_png(path)
    except OSError as failure:
        raise CmloraError(f"{path.name} cannot be read: {failure.strerror}") from None
    except CmloraError as error:
        raise CmloraError(without_path(str(error), path)) from None
    loras = {lora.name: lora.weight for lora in recipe.loras}
    order = Order(
        model=recipe.model,
        prompt=recipe.prompt,
        negative_prompt=recipe.negative_prompt,
        method=recipe.method,
        options=recipe.options,
        cache=recipe.cache,
        steps=recipe.steps,
        guidance=recipe.guidance_scale,
        width=recipe.width,
        height=recipe.height,
        schedule=recipe.schedule,
        text_encoder=recipe.text_encoder,
    )
    check(order, limits)
    check_strengths(loras, limits)
    if recipe.threads > limits.threads:
        raise CmloraError(f"threads are {recipe.threads}; this server allows {limits.threads}")
    return recipe


def asked_again(studio: Studio, path: str | Path, model: str) -> dict[str, Any]:
    """Values for the page's fields that ask for the picture in a PNG.

    Args:
        studio: the server's.
        path: of the PNG.
        model: the model that is selected on the page.

    Raises:
        CmloraError: if the file holds no recipe, or one of another model or of LoRAs that are not
            here.
    """
    recipe = read_recipe(path, studio.settings.limits)
    if model not in (recipe.model, Path(recipe.model).name):
        raise CmloraError(
            f"this picture was made with {Path(recipe.model).name}; select that model first"
        )
    return fields_of(recipe, studio.shelf_names(recipe, model))


def recipe_of(pipe: CMLoRAPipeline, order: Order, ticket: Ticket, tell: Tell, out: Path) -> Recipe:
    """The recipe of an order's first picture; coefficients are looked for if the method has none.

    Args:
        pipe: the model, with the order's LoRAs loaded.
        order: what is asked for.
        ticket: stops the search.
        tell: is told how the search goes.
        out: the output folder, where coefficients that were found are kept.

    Raises:
        CmloraError: if there is no prompt and no trigger word either, or the model refuses.
    """
    from cmlora.pipelines.native import native_execution, native_threads
    from cmlora.pipelines.render import write_recipe

    words = [w for lora in pipe.loras.values() for w in lora.applied.triggers[:1]]
    wish = order.wish(", ".join(words))
    if not wish.prompt.strip():
        raise CmloraError(
            "there is no prompt, and the LoRAs name no trigger words; say what to draw"
        )
    if not wish.schedule:  # changing strengths would have the weights added anew at every step
        wish = replace(wish, execution=native_execution(pipe))
    wish = replace(wish, threads=native_threads(pipe))
    if wish.method == "lorahub" and "coefficients" not in (wish.options or {}):
        wish = _searched(pipe, wish, ticket, tell, out)
    return write_recipe(pipe, wish)


def paint(
    studio: Studio,
    pipe: CMLoRAPipeline,
    recipe: Recipe,
    ticket: Ticket,
    tell: Tell,
    clock: Clock,
    words: str = "",
    *,
    folder: Path | None = None,
    strategy: Strategy | None = None,
) -> Picture:
    """Render one recipe, telling every step, and save it.

    Args:
        studio: the server's.
        pipe: the model, with the recipe's LoRAs loaded.
        recipe: what to make.
        ticket: stops the work inside a pass.
        tell: is told the progress.
        clock: of the whole work; one tick per step.
        words: said with the progress.
        folder: where the PNG goes; the output folder if not given.
        strategy: see `cmlora.pipelines.render.render`.
    """
    from cmlora.pipelines.render import render

    place = studio.settings.out if folder is None else folder
    place.mkdir(parents=True, exist_ok=True)
    previewer = Previewer(pipe.pipe)
    due = 0.0

    def stepped(index: int, latents: Any) -> None:
        nonlocal due
        ticket.check()
        clock.tick()
        begun = time.monotonic()
        draw = begun >= due
        seen = previewer.see(index, latents, draw=draw)
        if draw:
            ended = time.monotonic()
            due = ended + max(_PREVIEW_EVERY, _PREVIEW_SHARE * (ended - begun))
        tell(
            Progress(
                clock.done,
                clock.total,
                ", ".join(filter(None, (words, f"step {index + 1} of {recipe.steps}"))),
                clock.left(),
                "" if seen is None else data_uri(seen),
            )
        )

    with ticket.guarding(*_models(pipe)):
        made = render(pipe, recipe, on_latents=stepped, strategy=strategy)
    path = place / f"{recipe.digest()[:16]}.png"
    save_png(made.image, path, recipe)
    cost = studio.pass_cost(pipe, recipe)
    macs = None if cost is None else cost.of(made.report.full, made.report.light)
    if macs and made.report.seconds > 0:
        studio.paces[recipe.model] = macs / made.report.seconds
    return Picture(path, recipe, made.report, macs)


def _models(pipe: CMLoRAPipeline) -> list[Any]:
    """Everything of a pipeline that computes."""
    names = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    found = [getattr(pipe.pipe, name, None) for name in names]
    return [model for model in found if hasattr(model, "register_forward_pre_hook")]


def _opening(studio: Studio, model: str) -> str:
    return "loading LoRAs" if studio.loaded(model) is not None else f"loading {model}"


def _searched(pipe: CMLoRAPipeline, wish: Wish, ticket: Ticket, tell: Tell, out: Path) -> Wish:
    """The wish with coefficients looked for by rendering previews."""
    from cmlora.pipelines.coefficients import Previews, coefficients
    from cmlora.pipelines.render import write_recipe

    base = write_recipe(pipe, wish)
    clock = Clock(Previews().budget)

    def evaluated() -> None:
        ticket.check()
        clock.tick()
        tell(Progress(clock.done, clock.total, "looking for coefficients", clock.left()))

    with ticket.guarding(*_models(pipe)):
        found = coefficients(
            pipe.ensemble,
            base.prompt,
            pipe.ensemble.weights(),
            folder=out / "coefficients",
            on_evaluation=evaluated,
            guidance_scale=base.guidance_scale,
            width=base.width,
            height=base.height,
            execution=base.execution,
        )
    return replace(wish, options={**(wish.options or {}), "coefficients": found})
