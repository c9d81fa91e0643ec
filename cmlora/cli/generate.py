"""`cmlora generate`: a picture, or the same picture again from its file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cmlora import pictures
from cmlora.cli import arguments, options, proposed
from cmlora.cli.console import emit, err, out, progress, quiet_libraries, status
from cmlora.cli.destination import check_destination
from cmlora.errors import CmloraError

_BESIDE_A_RECIPE = ("recipe", "destination", "model", "config", "lora_dir", "device", "as_json")


def generate(
    context: typer.Context,
    prompt: options.Prompt = "",
    model: options.Model = "emoji",
    lora: Annotated[
        list[str] | None,
        typer.Option(help="PATH_OR_ID or PATH_OR_ID:WEIGHT; again for each LoRA."),
    ] = None,
    config: options.Config = None,
    lora_dir: options.LoRAFolder = None,
    role: Annotated[
        list[str] | None, typer.Option(help="NAME=high or NAME=low: a LoRA's frequency class.")
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="NAME=global, as styles are, or NAME=local: for gate and select."),
    ] = None,
    order: Annotated[
        str,
        typer.Option(
            help="NAME,NAME: whose turn comes first, for switch; by category and name if empty."
        ),
    ] = "",
    into: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=transformer_2, or NAME=transformer+transformer_2: Wan's denoisers."
        ),
    ] = None,
    second: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH_OR_ID[:WEIGHT]: a LoRA's other file, for transformer_2."),
    ] = None,
    method: Annotated[str, typer.Option(help="See `cmlora methods`.")] = "cmlora",
    option: options.Settings = None,
    cache: Annotated[
        str, typer.Option(help="Cache policy, such as none or uniform:3; the method's if empty.")
    ] = "",
    cut: options.Cut = "",
    text_encoder: Annotated[
        str, typer.Option(help="LoRAs in the text encoder: all, none or per_lora.")
    ] = "all",
    schedule: options.Schedule = "",
    uncond: options.Uncond = "per_lora",
    execution: options.Execution = "sequential",
    threads: options.Threads = 0,
    negative_prompt: options.NegativePrompt = "",
    steps: options.Steps = 30,
    guidance: options.Guidance = None,
    size: options.Size = "",
    seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
    device: options.Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    destination: Annotated[
        Path,
        typer.Option(
            "--out", help="The picture to write, .png, .webp or .jpg; its recipe is inside."
        ),
    ] = Path("cmlora.png"),
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="A picture, or its recipe as .json: made exactly again. Or what cmlora doctor "
            "wrote: followed where other options do not say otherwise."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Make one picture with several LoRAs, or replay the recipe inside a picture.

    Example: [bold]cmlora generate --lora character_1 --lora object_1:0.8 --out a.png[/bold]

    Again: [bold]cmlora generate --recipe a.png --out b.png[/bold]

    As the doctor says: [bold]cmlora generate --recipe advice.json --seed 3 --out c.png[/bold]
    """
    check_destination(destination, recipe)
    prompt, schedule, named = arguments.tagged(prompt, schedule, lora or ())
    loras = [arguments.weighted(text) for text in named]
    roles, scopes = arguments.roles(role or ()), arguments.scopes(scope or ())
    places, seconds = arguments.places(into or ()), arguments.seconds(second or ())
    wished: dict[str, Any] = {
        "method": method,
        "options": arguments.pairs("--option", option or ()),
        "cache": cache or None,
        "cut": arguments.cut(cut),
        "text_encoder": text_encoder,
        "schedule": schedule,
        "uncond": uncond,
        "execution": execution,
        "threads": threads,
        "negative_prompt": negative_prompt,
        "steps": steps,
        "guidance_scale": guidance,
        "size": arguments.size(size) if size else None,
        "seed": seed,
        "order": arguments.listed(order),
    }

    from cmlora.pipelines.proposal import Proposal
    from cmlora.pipelines.render import (
        Wish,
        assemble,
        pass_cost,
        render,
        restore,
        settled,
        write_recipe,
    )

    quiet_libraries()
    told = None if recipe is None else proposed.read(recipe)
    if told is not None and not isinstance(told, Proposal):
        exact = told
        _refuse_others(context, recipe)
        with status("loading"):
            place = model if _given(context, "model") else None
            pipe = restore(exact, model=place, folder=lora_dir, device=device, config=config)
    else:
        wanted: list[tuple[str | Path, float]] = [*loras]
        if told is not None:
            said = {name for name in wished if _given(context, name)}
            wanted, wished = proposed.followed(
                told, said, loras, wished, model=model, folder=lora_dir
            )
        with status("loading"):
            pipe = assemble(
                model,
                wanted,
                folder=lora_dir,
                roles=roles,
                scopes=scopes,
                dtype=dtype,
                device=device,
                config=config,
                into=places,
                second=seconds,
            )
        wish = Wish(prompt or arguments.prompt_of(pipe), **wished)
        _, chosen = settled(pipe, wish)
        if chosen.reason:
            err.print(chosen.reason)
        exact = write_recipe(pipe, with_coefficients(pipe, wish))
    with progress(exact.method, exact.steps) as bar:
        made = render(pipe, exact, on_step=lambda: bar.advance(bar.task_ids[0]))
    pictures.save(made.image, destination, exact)
    if as_json:
        cost = pass_cost(pipe, exact)
        macs = None if cost is None else cost.of(made.report.full, made.report.light)
        report = {**made.report.to_dict(), "macs": macs}
        emit({"file": str(destination), "report": report, **_recipe(exact)})
    else:
        full, light = sum(made.report.full.values()), sum(made.report.light.values())
        out.print(f"{destination}", soft_wrap=True)
        err.print(
            f"{exact.method}: {full} full and {light} light passes, {made.report.seconds:.1f} s"
        )


def with_coefficients(pipe: Any, wish: Any) -> Any:
    """The wish with LoraHub's coefficients looked for, if that is the method and none are given."""
    from dataclasses import replace

    from cmlora.pipelines.coefficients import Previews, coefficients
    from cmlora.pipelines.render import write_recipe

    if wish.method != "lorahub" or "coefficients" in (wish.options or {}):
        return wish
    base = write_recipe(pipe, wish)
    with progress("looking for coefficients", Previews().budget) as bar:
        found = coefficients(
            pipe.ensemble,
            base.prompt,
            pipe.ensemble.weights(),
            on_evaluation=lambda: bar.advance(bar.task_ids[0]),
            guidance_scale=base.guidance_scale,
            width=base.width,
            height=base.height,
            execution=base.execution,
        )
    return replace(wish, options={**(wish.options or {}), "coefficients": found})


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option was given, even if it has its default value."""
    source = context.get_parameter_source(name)
    # by its name, because typer has a copy of click's class
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _refuse_others(context: typer.Context, recipe: Path | None) -> None:
    """Refuses options about the picture, of which a recipe says everything.

    Raises:
        CmloraError: names those that were given.
    """
    given = [
        option.opts[0]
        for option in context.command.params
        if option.name and option.name not in _BESIDE_A_RECIPE and _given(context, option.name)
    ]
    if given:
        raise CmloraError(
            f"{', '.join(given)}: --recipe {recipe} says everything about its picture already; "
            f"leave {'it' if len(given) == 1 else 'them'} out, or draw anew without --recipe"
        )


def _recipe(recipe: Any) -> dict[str, Any]:
    import json

    return {"recipe": json.loads(recipe.to_json())}
