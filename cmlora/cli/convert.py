"""`cmlora convert`: an adapter of any kind as an ordinary LoRA."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cmlora.cli.console import emit, out, quiet_libraries, status
from cmlora.cli.options import AsJson, Model
from cmlora.errors import CmloraError


def convert(
    file: Annotated[str, typer.Argument(help="The adapter: a file of any trainer or tuner.")],
    output: Annotated[str, typer.Option("--out", "-o", help="Where the LoRA is written.")],
    to: Annotated[str, typer.Option(help="The form; lora is the only one.")] = "lora",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank of a layer; exact if not given.")
    ] = None,
    model: Model = "emoji",
    loose: Annotated[
        bool, typer.Option("--loose", help="Leave out what a LoRA cannot hold: biases, norms.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter of another kind as an ordinary LoRA, which every program reads.

    What a smaller rank cannot hold is said as a share of the norm. Forms and tuners that depend on
    the weights (DoRA, OFT, (IA)^3, ...) need the model they were trained on.

    Example: [bold]cmlora convert ink.safetensors --to lora --rank 16 -o ink_lora.safetensors[/bold]
    """
    from cmlora import container, files, keys, peft_config
    from cmlora.checks import choice

    choice("convert", "--to", to, ("lora",))
    header = container.header(file)
    layout = keys.layout(header.shapes, shapes=header.shapes)
    tuned = peft_config.tuners(header.metadata.get("lora_adapter_metadata")) - {"LORA"}
    if tuned and (layout.leftover or not layout.modules):
        lora, error = _exported(file, model, rank)
    else:
        pipe = None
        if files.open_file(file).plain()[1]:
            from cmlora.pipelines.models import open_pipeline

            quiet_libraries()
            with status("loading the model that the file depends on"):
                pipe = open_pipeline(model)
        try:
            lora, error = files.convert(file, pipe, rank=rank, strict=not loose)
        except CmloraError as mistake:
            raise CmloraError(str(mistake).replace("strict=False", "--loose")) from None
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


def _exported(file: str, model: str, rank: int | None) -> tuple[Any, float]:
    """An adapter of one of PEFT's or our own tuners, by way of the model."""
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
