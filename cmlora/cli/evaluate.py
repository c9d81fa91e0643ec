"""`cmlora evaluate`: the table of its commands."""

import typer

from cmlora.cli.evaluate_judge import judge, score
from cmlora.cli.evaluate_report import correlate, paper, report
from cmlora.cli.evaluate_run import init, run

evaluate = typer.Typer(
    name="evaluate",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@evaluate.callback()
def options() -> None:
    """Compare methods on a testbed: run, score, judge, report. Every command has --json.

    Example: [bold]cmlora evaluate run emoji --sets 10 --out run[/bold]
    """


for command in (run, score, judge, correlate, report, paper, init):
    evaluate.command()(command)
