"""`cmlora inspect`: what is in a LoRA file, and what a model's folder was made of."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from cmlora.cli.console import emit, out
from cmlora.cli.options import AsJson
from cmlora.cli.whole import is_model


def inspect(
    files: Annotated[
        list[str], typer.Argument(help="LoRA files, ids of embedded LoRAs, or folders of models.")
    ],
    plain: Annotated[
        bool,
        typer.Option(
            "--diffusers/--no-diffusers",
            help="Find out what plain diffusers would drop; takes a few seconds.",
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Show what LoRA files are: trainer, base, rank, triggers, hashes. Nothing is executed.

    Also: what plain diffusers would drop of them, and what we do with them. Of a model's folder:
    its parts, and which models it was merged from.

    Example: [bold]cmlora inspect ink.safetensors --json[/bold]
    """
    from cmlora.describe import describe
    from cmlora.pipelines.origin import describe as describe_model

    found = []
    for name in files:
        if is_model(name):
            found.append(describe_model(Path(name).expanduser()))
            continue
        path = _path(name)
        facts = describe(path)
        if plain:
            from cmlora.dropped import dropped

            facts["diffusers"] = dropped(path, facts["family"])
        found.append(facts)
    if as_json:
        emit(found)
        return
    for facts in found:
        _show(facts)


def _show(facts: dict[str, Any]) -> None:
    """One file as a table for people, and one of its blocks."""
    title = Path(facts["file"]).name
    table = Table("what", Column("found", overflow="fold"), title=title)
    for key, value in facts.items():
        if key == "use":
            table.add_row(key, value["words"])
        elif key == "diffusers":
            table.add_row(key, _diffusers(value))
        elif key == "leftover":
            table.add_row(key, _listed([f"{k} ({why})" for k, why in value.items()]))
        elif key != "blocks":
            table.add_row(key, _words(value))
    out.print(table)
    if "blocks" not in facts:
        return
    blocks = Table("block", "modules", "rank", "alpha")
    for name, block in facts["blocks"].items():
        row = _words(block["rank"]), _words([f"{alpha:g}" for alpha in block["alpha"]])
        blocks.add_row(name, str(block["modules"]), *row)
    out.print(blocks)


def _diffusers(found: dict[str, Any]) -> str:
    """What plain diffusers does with a file, in words."""
    if found["pipeline"] is None:
        return "not known which of its pipelines this is for"
    if not found["loads"]:
        return f"{found['pipeline']} refuses it: {found['error']}"
    if not found["dropped"]:
        return f"{found['pipeline']} loads it whole"
    lost = found["dropped"]
    return f"{found['pipeline']} drops {len(lost)} keys without an error: {_listed(lost)}"


def _listed(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (", ".join(names[:shown]) + more) or "-"


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
