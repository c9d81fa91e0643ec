"""`cmlora inspect`: what is in a LoRA file."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from cmlora.cli.console import emit, out
from cmlora.cli.options import AsJson


def inspect(
    files: Annotated[list[str], typer.Argument(help="LoRA files, or ids of embedded LoRAs.")],
    as_json: AsJson = False,
) -> None:
    """Show what LoRA files are: trainer, base, rank, triggers, hashes. Nothing is executed.

    Example: [bold]cmlora inspect ink.safetensors --json[/bold]
    """
    from cmlora.files import describe

    found = [describe(_path(name)) for name in files]
    if as_json:
        emit(found)
        return
    for facts in found:
        table = Table("what", Column("found", overflow="fold"), title=Path(facts["file"]).name)
        for key, value in facts.items():
            table.add_row(key, _words(value))
        out.print(table)


def _path(name: str) -> Path:
    from cmlora.pipelines.library import find
    from cmlora.pipelines.models import EMBEDDED

    return find(name, model=EMBEDDED)


def _words(value: Any) -> str:
    """A JSON value as a person reads it."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_words(inner)}" for key, inner in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value)) or "-"
    return "-" if value in (None, "") else str(value)
