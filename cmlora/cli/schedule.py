"""`cmlora schedule`: what a schedule does at every step, and its text for other programs."""

from typing import Annotated, Any

import typer
from rich.table import Table

from cmlora.cli import arguments
from cmlora.cli.console import emit, out
from cmlora.cli.options import AsJson
from cmlora.errors import CmloraError


def schedule(
    text: Annotated[str, typer.Argument(help="Such as '<lora:ink:0@0,1@0.5>'.")],
    lora: Annotated[
        list[str] | None, typer.Option(help="NAME:WEIGHT of a LoRA; again for each.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 10,
    to: Annotated[
        str,
        typer.Option(help="Write it for loractl, prompt-control, a1111 or diffusers instead."),
    ] = "",
    order: Annotated[
        str, typer.Option(help="Of two numbers in a tag: te:unet as in A1111, or unet:te.")
    ] = "te:unet",
    as_json: AsJson = False,
) -> None:
    """Show the strength of every LoRA at every step, or write a schedule for another program.

    Example: [bold]cmlora schedule '<lora:ink:0@0,1@0.5>' --to prompt-control[/bold]
    """
    from cmlora.plan import Step
    from cmlora.schedules.parse import parse_schedule

    if steps < 1:
        raise CmloraError("--steps is at least 1")
    if order not in ("te:unet", "unet:te"):
        raise CmloraError(f"--order {order}: te:unet or unet:te")
    found = parse_schedule(text, order="te:unet" if order == "te:unet" else "unet:te")
    weights = dict.fromkeys(found.names, 1.0) | dict(map(arguments.weighted, lora or ()))
    found.check(list(weights))
    if to:
        written = _written(to, found, weights, steps)
        if as_json:
            emit({"to": to, "text": written})
        else:
            out.print(written, markup=False, highlight=False, soft_wrap=True, end="")
            out.print()
        return
    rows = [
        {name: _strength(found.factor(name, Step(i, steps)), weights[name]) for name in weights}
        for i in range(steps)
    ]
    if as_json:
        emit({"steps": rows})
        return
    table = Table("step", *weights)
    for index, row in enumerate(rows):
        table.add_row(str(index), *(_shown(value) for value in row.values()))
    out.print(table)


def _written(to: str, schedule: Any, weights: dict[str, float], steps: int) -> str:
    """The schedule for another program."""
    from cmlora.schedules import export

    writers = {
        "loractl": export.loractl,
        "prompt-control": export.prompt_control,
        "a1111": export.a1111,
    }
    if to == "diffusers":
        return export.diffusers(schedule, weights, steps)
    if to not in writers:
        raise CmloraError(f"--to {to}: {', '.join(writers)} or diffusers")
    return writers[to](schedule, weights)


def _strength(factor: Any, weight: float) -> Any:
    """A number, or for curves by block pairs of an expression and a number."""
    if isinstance(factor, tuple):
        return [[pattern or ".", weight * value] for pattern, value in factor]
    return weight * factor


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{pattern} {number:.3g}" for pattern, number in value)
    return f"{value:.3g}"
