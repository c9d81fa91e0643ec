"""`cmlora convert`: an adapter of any kind as an ordinary LoRA."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cmlora.cli.console import emit, out
from cmlora.cli.options import AsJson, Model


def convert(
    file: Annotated[str, typer.Argument(help="The adapter: a LoRA, or a file of another tuner.")],
    output: Annotated[str, typer.Option("--out", "-o", help="Where the LoRA is written.")],
    to: Annotated[str, typer.Option(help="The form; lora is the only one.")] = "lora",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank of a layer; exact if not given.")
    ] = None,
    model: Model = "emoji",
    as_json: AsJson = False,
) -> None:
    """Write an adapter of another kind as an ordinary LoRA, which every program reads.

    What a smaller rank cannot hold is said as a share of the norm. Tuners that depend on the
    weights need the model they were trained on.

    Example: [bold]cmlora convert ink.safetensors --to lora --rank 16 -o ink_lora.safetensors[/bold]
    """
    from cmlora import container, files
    from cmlora.checks import choice

    choice("convert", "--to", to, ("lora",))
    header = container.header(file)
    if any("lora_A" in key or "lora_down" in key for key in header.shapes):
        lora, error = _smaller(files.read(file), rank)
    else:
        lora, error = _exported(file, model, rank)
    files.write(lora, output)
    ranks = [update.rank for update in lora.updates.values()]
    facts: dict[str, Any] = {
        "file": output,
        "modules": len(ranks),
        "rank": [min(ranks), max(ranks)],
        "relative_error": error,
    }
    if as_json:
        emit(facts)
        return
    out.print(
        f"{output}: {len(ranks)} modules of rank {min(ranks)} to {max(ranks)}, "
        f"relative error {error:.2e}"
    )


def _smaller(lora: Any, rank: int | None) -> tuple[Any, float]:
    from cmlora.lora import stack

    if rank is None:
        return lora, 0.0
    cut = lora.truncate(rank)
    norm = lora.norm()
    return cut, stack([(lora, 1.0), (cut, -1.0)], "lost").norm() / norm if norm else 0.0


def _exported(file: str, model: str, rank: int | None) -> tuple[Any, float]:
    from dataclasses import replace

    from cmlora.adapters.tuners import TUNERS, store
    from cmlora.adapters.tuners.export import to_lora
    from cmlora.pipelines.models import open_pipeline

    assert TUNERS  # the table makes the tuners known to PEFT
    store.read(file)
    pipe = open_pipeline(model)
    store.load(pipe, file, "converted")
    lora, error = to_lora(pipe, "converted", rank)
    return replace(lora, name=Path(file).stem), error
