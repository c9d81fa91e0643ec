"""The command `cmlora`: the table of its sub-commands, and what happens when one fails."""

import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cmlora import __version__
from cmlora.cli.analyze import analyze
from cmlora.cli.bake import bake
from cmlora.cli.calib import calib
from cmlora.cli.compare import compare
from cmlora.cli.compress import compress
from cmlora.cli.console import err, headed
from cmlora.cli.convert import convert
from cmlora.cli.cost import cost
from cmlora.cli.doctor import doctor
from cmlora.cli.env import env
from cmlora.cli.evaluate import evaluate
from cmlora.cli.extract import extract
from cmlora.cli.generate import generate
from cmlora.cli.inspect import inspect
from cmlora.cli.merge import merge
from cmlora.cli.methods import methods
from cmlora.cli.pack import pack
from cmlora.cli.profile import profile
from cmlora.cli.replay import replay
from cmlora.cli.schedule import schedule
from cmlora.cli.train import train
from cmlora.cli.ui import ui
from cmlora.cli.unpack import unpack
from cmlora.errors import CmloraError

PICTURES, FILES, STUDIES = "Pictures", "LoRA files", "Studies"

MISTAKE, INTERRUPTED = 2, 130


class Commands(TyperGroup):
    """A group that answers a user's mistake with one line and Ctrl-C with a clean end."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("once", UserWarning)
                warnings.showwarning = _show  # one line instead of a place in the source
                return super().invoke(ctx)
        except CmloraError as mistake:
            err.print(headed("error", one_line(str(mistake)), "red"), soft_wrap=True)
            raise typer.Exit(MISTAKE) from None
        except KeyboardInterrupt:
            err.print("interrupted; what was finished is kept")
            raise typer.Exit(INTERRUPTED) from None


def _show(message: Warning | str, *_: object, **__: object) -> None:
    err.print(headed("warning", one_line(str(message)), "yellow"), soft_wrap=True)


def one_line(message: str) -> str:
    """The message without line breaks and runs of blanks."""
    return " ".join(message.split())


app = typer.Typer(
    cls=Commands,
    name="cmlora",
    help="Several LoRAs in one picture, with any diffusers pipeline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Several LoRAs in one picture, with any diffusers pipeline."""


for command, panel in (
    (generate, PICTURES),
    (compare, PICTURES),
    (replay, PICTURES),
    (cost, PICTURES),
    (profile, PICTURES),
    (schedule, PICTURES),
    (ui, PICTURES),
    (inspect, FILES),
    (convert, FILES),
    (compress, FILES),
    (doctor, FILES),
    (analyze, FILES),
    (merge, FILES),
    (bake, FILES),
    (calib, FILES),
    (pack, FILES),
    (unpack, FILES),
    (train, FILES),
    (extract, FILES),
    (methods, STUDIES),
    (env, STUDIES),
):
    app.command(rich_help_panel=panel)(command)

app.add_typer(evaluate, name="evaluate", rich_help_panel=STUDIES)


def main() -> None:
    """The console script."""
    app()
