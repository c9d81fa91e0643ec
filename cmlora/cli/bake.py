"""`cmlora bake`: a composition as one LoRA file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Column, Table

from cmlora.cli import options
from cmlora.cli.console import emit, out, progress, quiet_libraries, status
from cmlora.cli.merge import writable
from cmlora.errors import CmloraError

if TYPE_CHECKING:
    from cmlora.recipe import Recipe


def bake(
    recipe: Annotated[Path, typer.Argument(help="A PNG that cmlora made, or a recipe as JSON.")],
    output: Annotated[
        Path,
        typer.Option("--out", "-o", help="The .safetensors file to write.", show_default=False),
    ],
    rank: Annotated[
        int | None, typer.Option(help="Largest rank of a module; the sum of the ranks if empty.")
    ] = None,
    fit: Annotated[
        Literal["none", "strengths", "factors"],
        typer.Option(help="What is free: nothing, one strength per LoRA and module, all numbers."),
    ] = "factors",
    fit_steps: Annotated[int, typer.Option(help="Steps of learning, in either stage.")] = 60,
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it moved.")] = None,
    config: options.Config = None,
    lora_dir: options.LoRAFolder = None,
    name: Annotated[str, typer.Option(help="Of the result; the output's stem if empty.")] = "",
    device: options.Device = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Turn any composition into the nearest single LoRA, and say how near it is.

    Example: [bold]cmlora bake picture.png -o both.safetensors[/bold]
    """
    from cmlora.files import sha256, write
    from cmlora.pipelines.bake import bake as turn
    from cmlora.pipelines.render import restore

    writable(output, force)
    exact = read_recipe(recipe)
    quiet_libraries()
    with status("loading"):
        pipe = restore(exact, model=model, folder=lora_dir, device=device, config=config)
    stages = {"none": 0, "strengths": 1, "factors": 2}[fit]
    with progress(f"fitting to {exact.method}", max(1, stages * fit_steps)) as bar:
        found = turn(
            pipe,
            exact,
            rank=rank,
            fit=fit,
            steps=fit_steps,
            name=name or output.stem,
            on_step=lambda: bar.advance(bar.task_ids[0]),
        )
    write(found.lora, output)
    ranks = max(update.rank for update in found.lora.updates.values())
    size = output.stat().st_size
    if as_json:
        distances = {"baked": found.distance, "sum": found.merged, "mean": found.started}
        facts = {"file": str(output), "sha256": sha256(output), "rank": ranks, "bytes": size}
        emit({**facts, "method": exact.method, "distance": distances, "steps": list(found.steps)})
        return
    table = Table(
        "one LoRA instead of the composition",
        Column("distance", justify="right"),
        title=f"{exact.method} of {', '.join(lora.name for lora in exact.loras)}",
        caption="between answers of the denoiser, at another seed; the model alone is at 1",
    )
    table.add_row(output.name, f"{found.distance:.3f}")
    table.add_row("the LoRAs added up", f"{found.merged:.3f}")
    table.add_row("their mean", f"{found.started:.3f}")
    out.print(table)
    out.print(f"{output}: rank {ranks}, {size / 2**20:.1f} MB", soft_wrap=True)


def read_recipe(path: Path) -> "Recipe":
    """The recipe inside a picture, or in a file of its own.

    Raises:
        CmloraError: if there is none.
    """
    from cmlora.recipe import Recipe, from_png

    if path.suffix.lower() != ".json":
        return from_png(path)
    try:
        return Recipe.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CmloraError(f"cannot read {path}: {error}") from None
