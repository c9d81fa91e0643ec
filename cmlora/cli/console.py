"""Where a command's words go: results to stdout, everything else to stderr."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

# Without markup: names of files and LoRAs, and of variants, have square brackets of their own.
# Without emoji: so have tags and prompts colons, and :cat: would become a picture.
err = Console(stderr=True, highlight=False, markup=False, emoji=False)
out = Console(highlight=False, markup=False, emoji=False)


def emit(result: Any) -> None:
    """Print one JSON document to stdout."""
    typer.echo(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False))


def headed(head: str, words: str, style: str = "bold") -> Text:
    """A line whose beginning stands out."""
    return Text.assemble((f"{head}:", style), f" {words}")


@contextmanager
def progress(title: str, total: int) -> Iterator[Progress]:
    """A bar on stderr with one task; `bar.advance(bar.task_ids[0])` moves it."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bar:
        bar.add_task(title, total=total)
        yield bar


@contextmanager
def status(words: str) -> Iterator[None]:
    """A spinner on stderr while something of unknown length happens."""
    with err.status(words):
        yield


def quiet_libraries() -> None:
    """Silence the libraries' own bars and advice; errors still come through."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
