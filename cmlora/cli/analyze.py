"""`cmlora analyze`: a whole folder of LoRAs, two LoRAs or models, or how strong LoRAs may be."""

import csv
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cmlora.cli.align import align
from cmlora.cli.console import emit, err, out, status
from cmlora.cli.options import AsJson, LoRAFolder
from cmlora.cli.strength import strength
from cmlora.errors import CmloraError

KINDS = ("library", "align", "strength")


def analyze(
    what: Annotated[str, typer.Argument(help="library, align or strength.")],
    references: Annotated[
        list[str],
        typer.Argument(help="A folder of LoRAs; two LoRAs or two models; LoRAs with weights."),
    ],
    scores: Annotated[
        Path | None,
        typer.Option(help="CSV of measured pairs, NAME,NAME,SCORE; the other pairs are guessed."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="For align of LoRAs: measure the barrier on this model.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="For align: what models are asked; may be repeated.")
    ] = None,
    points: Annotated[int, typer.Option(help="For align: places on the way, ends included.")] = 11,
    follow: Annotated[
        int, typer.Option(help="For align of models: steps of matching that follow the loss.")
    ] = 0,
    calib: Annotated[
        Path | None, typer.Option(help="For strength: what cmlora calib wrote.")
    ] = None,
    lora_dir: LoRAFolder = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw what was found into this .png or .svg.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing plot.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at a folder of LoRAs, at whether two can become one, or at how strong they may be.

    library: who is like whom, what is the same file twice, which LoRAs form groups and how much is
    saved by coding each group on its own; with scores of some pairs, which others to try.

    align: cosine and singular directions of two LoRAs by block, and what averaging their factors
    would lose; with a model, whether the loss rises on the way from one to the other.

    strength: up to which strength a LoRA leaves the model's layers in their range.

    Example: [bold]cmlora analyze library loras/ --scores measured.csv[/bold]

    Example: [bold]cmlora analyze align cat.safetensors hat.safetensors --plot likeness.svg[/bold]

    Example: [bold]cmlora analyze align character_1 style_1 --model emoji --plot barrier.svg[/bold]

    Example: [bold]cmlora analyze strength character_1 style_1:0.8 --calib calib.safetensors[/bold]
    """
    if what not in KINDS:
        raise CmloraError(f"cannot analyze {what!r}; known: {', '.join(KINDS)}")
    if plot is not None and plot.exists() and not force:
        raise CmloraError(f"{plot} exists; --force replaces it")
    if what == "align":
        align(
            references,
            model=model,
            prompts=prompt or (),
            points=points,
            follow=follow,
            folder=lora_dir,
            plot=plot,
            as_json=as_json,
        )
    elif what == "strength":
        strength(references, calib=calib, folder=lora_dir, plot=plot, as_json=as_json)
    elif len(references) != 1:
        raise CmloraError(f"library looks at one folder, not {len(references)}")
    else:
        _library(Path(references[0]), scores, plot, as_json)


def _library(folder: Path, scores: Path | None, plot: Path | None, as_json: bool) -> None:
    """Neighbours, duplicates and clusters in a folder, and promising pairs."""
    from dataclasses import replace

    from cmlora.adapters.analysis.heatmap import Heatmap
    from cmlora.adapters.analysis.library import survey
    from cmlora.adapters.analysis.mismatch import check_families
    from cmlora.adapters.analysis.pairs import predict
    from cmlora.files import read
    from cmlora.pipelines.library import SUFFIX

    if not folder.is_dir():
        raise CmloraError(f"{folder} is not a folder")
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    if len(paths) < 2:
        raise CmloraError(f"{folder} holds {len(paths)} {SUFFIX} files; two or more are compared")
    measured = {} if scores is None else _scores(scores)
    with status("comparing"):
        loras = [replace(read(path), name=path.stem) for path in paths]
        family = check_families(loras)
        found = survey(loras)
    guesses = predict(found.names, measured) if scores is not None else None
    if plot is not None:
        rows = tuple(tuple(map(float, row)) for row in found.similarity)
        Heatmap("cosine of the updates", found.names, found.names, rows).save(plot)
        err.print(f"wrote {plot}")
    if as_json:
        result = {"family": family, **found.json()}
        if guesses is not None:
            result["guesses"] = {
                **guesses._asdict(),
                "pairs": [guess._asdict() for guess in guesses.pairs],
            }
        emit(result)
        return
    clusters = {name: i + 1 for i, group in enumerate(found.clusters) for name in group}
    table = Table("LoRA", "cluster", "nearest", title=f"{len(found.names)} LoRAs for {family}")
    for name, near in found.neighbours().items():
        listed = ", ".join(f"{other} {cosine:+.2f}" for other, cosine in near)
        table.add_row(name, str(clusters[name]), listed)
    out.print(table)
    for group in found.duplicates:
        out.print(f"the same: {', '.join(group)}", soft_wrap=True)
    out.print(
        f"coding rate {found.rate:.2f} nats, of which the clusters save {found.gain:.2f}",
        soft_wrap=True,
        highlight=False,
    )
    for guess in guesses.pairs[:5] if guesses is not None else ():
        out.print(f"try {guess.one} with {guess.other}: {guess.score:.3g} expected")
    if guesses is not None and guesses.error is not None:
        out.print(f"typical error {guesses.error:.2g}, of the mean alone {guesses.plain:.2g}")


def _scores(path: Path) -> dict[tuple[str, str], float]:
    """The rows of a CSV file; a first row without a number is a heading."""
    found: dict[tuple[str, str], float] = {}
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise CmloraError(f"cannot read {path}: {error}") from None
    for number, row in enumerate(rows, 1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        try:
            one, other, score = cells[0], cells[1], float(cells[2])
        except (IndexError, ValueError):
            if number == 1:
                continue
            score, one, other = math.nan, "", ""
        if not math.isfinite(score) or len(cells) != 3:
            raise CmloraError(f"{path}, line {number}: expected NAME,NAME,SCORE")
        if (one, other) in found:
            raise CmloraError(f"{path}, line {number}: {one} and {other} have two scores")
        found[one, other] = score
    return found
