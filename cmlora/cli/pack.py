"""`cmlora pack`: many similar LoRAs in one smaller file."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Column, Table

from cmlora.cli import options
from cmlora.cli.console import emit, out, status
from cmlora.cli.merge import writable
from cmlora.errors import CmloraError


def pack(
    loras: Annotated[list[str], typer.Argument(help="LoRA files, or ids of embedded LoRAs.")],
    output: Annotated[
        Path,
        typer.Option("--out", "-o", help="The .safetensors file to write.", show_default=False),
    ],
    size: Annotated[
        int, typer.Option("--size", "-p", help="Basis vectors; more are more exact and larger.")
    ] = 1,
    granularity: Annotated[
        Literal["module", "position"], typer.Option(help="What shares a basis.")
    ] = "module",
    lora_dir: options.LoRAFolder = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Store LoRAs as a mean, a basis and coefficients; `cmlora unpack` gives each one back.

    Example: [bold]cmlora pack anime.safetensors ink.safetensors oil.safetensors -p 1 -o styles.safetensors[/bold]
    """  # noqa: E501
    from cmlora.adapters.merging import rmm
    from cmlora.files import read
    from cmlora.pipelines.library import adapter_name, find
    from cmlora.pipelines.models import EMBEDDED

    writable(output, force)
    sources: dict[str, Path] = {}
    for reference in loras:
        path = find(reference, model=EMBEDDED, folder=lora_dir)
        if output.exists() and output.samefile(path):
            raise CmloraError(f"{output} is one of the files to pack")
        sources[adapter_name(path, sources)] = path
    with status("packing"):
        found = [replace(read(path), name=name) for name, path in sources.items()]
        packed = rmm.pack(found, size, granularity=granularity)
        rmm.save(packed, output)
    before = sum(path.stat().st_size for path in sources.values())
    after = output.stat().st_size
    if as_json:
        emit({"file": str(output), "bytes": after, "before": before, "errors": dict(packed.errors)})
        return
    table = Table("LoRA", Column("loss", justify="right"), title=str(output))
    for name, error in packed.errors.items():
        table.add_row(name, f"{error:.2%}")
    out.print(table)
    out.print(f"{after / 2**20:.2f} MB instead of {before / 2**20:.2f} MB")
