"""`cmlora evaluate report`, `correlate` and `paper`: what the numbers say."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cmlora.cli import arguments, options
from cmlora.cli.console import emit, err, status
from cmlora.cli.evaluate_run import Run


def report(
    run: Run,
    destination: Annotated[
        Path | None, typer.Option("--out", help="Folder; RUN/report if not given.")
    ] = None,
    baseline: Annotated[
        str, typer.Option(help="The method that tables compare with; merge if it is there.")
    ] = "",
    focus: Annotated[
        str, typer.Option(help="The method that findings are about; cmlora if it is there.")
    ] = "",
    metrics: Annotated[str, typer.Option(help="Only these, separated by commas.")] = "",
    methods: Annotated[
        str, typer.Option(help="Only these; tests are corrected for them alone.")
    ] = "",
    n: Annotated[str, typer.Option("--n", help="Only sets of so many LoRAs, such as 5.")] = "",
    seeds: Annotated[str, typer.Option(help="Only these, such as 0-3.")] = "",
    common: Annotated[
        bool, typer.Option("--common", help="Only sets and seeds drawn by every method.")
    ] = False,
    gallery: Annotated[int, typer.Option(help="Sets per N whose pictures are shown.")] = 4,
    as_json: options.AsJson = False,
) -> None:
    """Write tables, plots and pictures of a run: Markdown, LaTeX, CSV and one HTML file.

    Example: [bold]cmlora evaluate report run --baseline switch[/bold]
    """
    from cmlora.eval.report.selection import Selection
    from cmlora.eval.report.write import write_report
    from cmlora.eval.study import Study
    from cmlora.eval.variants import canonical

    selection = Selection(
        labels=[canonical(word) for word in arguments.variants(methods)],
        sizes=arguments.sizes(n) if n else (),
        seeds=arguments.seeds(seeds) if seeds else (),
        common=common,
    )
    with status("writing"):
        files = write_report(
            Study(run),
            destination,
            baseline=canonical(baseline) if baseline else None,
            focus=canonical(focus) if focus else None,
            metrics=arguments.listed(metrics),
            selection=selection,
            per_size=max(0, gallery),
        )
    if as_json:
        emit({"files": [str(path) for path in files]})
    else:
        for path in files:
            err.print(str(path), soft_wrap=True)


def correlate(
    scores: Annotated[Path, typer.Argument(help="JSON file of human scores and metrics.")],
    as_json: options.AsJson = False,
) -> None:
    """Correlate metrics with people's scores: Pearson, Spearman, Kendall, with intervals.

    Example: [bold]cmlora evaluate correlate scores.json[/bold]
    """
    from cmlora.eval.correlate import read_scores, tables, to_dict

    items = read_scores(scores)
    with status("resampling"):
        found: Any = to_dict(items) if as_json else tables(items)
    if as_json:
        emit(found)
    else:
        _say(found)


def paper(
    run: Annotated[Path | None, typer.Argument(help="Folder of a run, to show beside.")] = None,
    tables: Annotated[str, typer.Option(help="Ids, separated by commas; all if empty.")] = "",
    as_json: options.AsJson = False,
) -> None:
    """Print the published tables beside a run's own numbers for the same cells.

    Example: [bold]cmlora evaluate paper run --tables clip_score[/bold]
    """
    from cmlora.eval.paper import beside
    from cmlora.eval.study import Study

    found = beside(None if run is None else Study(run), only=arguments.listed(tables))
    if as_json:
        emit([vars(table) for table in found])
    else:
        _say(found)


def _say(tables: Any) -> None:
    """Tables as Markdown, which reads well in a terminal and in a paper's draft."""
    typer.echo("\n\n".join(table.markdown() for table in tables))
