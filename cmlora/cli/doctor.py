"""`cmlora doctor`: how LoRAs will get along, before anything is rendered."""

import json
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cmlora.cli.console import emit, err, headed, out, status
from cmlora.cli.options import AsJson, LoRAFolder
from cmlora.errors import CmloraError


def doctor(
    loras: Annotated[list[str], typer.Argument(help="LoRA files, or ids of embedded LoRAs.")],
    base: Annotated[
        str | None,
        typer.Option(help="What they are used with, such as emoji, sd15, sdxl, sd3, flux, wan."),
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option(help="What cmlora calib measured on their base: how strong they may be."),
    ] = None,
    lora_dir: LoRAFolder = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw cosines by block into this .png or .svg.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Write weights, order, method and schedule into this .json."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing plot or recipe.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find conflicts between LoRAs from their files alone, and what to do about each.

    Nothing is rendered and no model is needed: updates are compared with each other, in seconds.
    What follows from it for weights, order, method and schedule is a recipe that `cmlora generate`
    takes; the model, the prompt and the seed are said there.

    Example: [bold]cmlora doctor character_1 style_1 --plot conflicts.svg[/bold]

    Example: [bold]cmlora doctor cat.safetensors hat.safetensors --base sdxl --recipe advice.json
    [/bold]

    Then: [bold]cmlora generate --recipe advice.json --model sdxl-folder --prompt "a cat, a hat"
    [/bold]
    """
    from dataclasses import replace

    from cmlora.adapters.analysis.doctor import examine
    from cmlora.adapters.analysis.heatmap import of_pairs
    from cmlora.adapters.analysis.mismatch import BASES
    from cmlora.adapters.analysis.saturation import Saturation, advise, saturation, to_json
    from cmlora.adapters.calibration import load
    from cmlora.atomic import replacing
    from cmlora.files import read
    from cmlora.frequency.card import read_card
    from cmlora.pipelines.library import adapter_name, find
    from cmlora.pipelines.models import EMBEDDED
    from cmlora.pipelines.proposal import propose

    if recipe is not None and recipe.suffix != ".json":
        raise CmloraError(f"--recipe {recipe} should end in .json")
    for path in (plot, recipe):
        if path is not None and path.exists() and not force:
            raise CmloraError(f"{path} exists; --force replaces it")
    paths: dict[str, Path] = {}
    for reference in loras:
        path = find(reference, model=EMBEDDED, folder=lora_dir)
        paths[adapter_name(path, paths)] = path
    with status("reading"):
        found = [replace(read(path), name=name) for name, path in paths.items()]
    cards = {name: read_card(path) for name, path in paths.items()}
    frequency = {name: card.frequency for name, card in cards.items() if card is not None}
    with status("comparing"):
        report = examine(found, base, frequency)
    pairs = report.pairs()
    limits: tuple[Saturation, ...] = ()
    if calib is not None:
        with status("measuring"):
            limits = saturation(load(calib), found, [1.0] * len(found))
        report = replace(report, advice=(*report.advice, *advise(limits, {})))
    if plot is not None:
        of_pairs("cosine of the updates by block", pairs).save(plot)
        err.print(f"wrote {plot}")
    profiles = {name: card for name, card in cards.items() if card is not None}
    proposal = propose(report.findings, paths, profiles, limits)
    if recipe is not None:
        with replacing(recipe) as file:
            file.write((json.dumps(proposal.table(), indent=1) + "\n").encode())
        err.print(f"wrote {recipe}")
    if as_json:
        strength = {"strength": to_json(limits)} if limits else {}
        emit({**report.json(), **strength, "recipe": proposal.table()})
        return
    facts = report.findings
    table = Table("LoRA", "size", "detail", "spikes", title=f"for {report.family}")
    for name, norm, depth in zip(facts.names, facts.norms, facts.detail, strict=True):
        place = f"{depth:.2f}" if math.isfinite(depth) else "-"
        table.add_row(name, f"{norm:.3g}", place, str(len(facts.spikes[name])))
    out.print(table)
    if pairs:
        table = Table("pair", "cosine", "shared directions", "strength of the sum")
        for pair in pairs:
            numbers = f"{pair['cosine']:+.3f}", f"{pair['shared_directions']:.0%}"
            table.add_row(" / ".join(pair["loras"]), *numbers, f"{pair['stacking']:.2f}")
        out.print(table)
    for advice in report.advice:
        out.print(headed(advice.topic, advice.do), soft_wrap=True)
        out.print(f"  because {advice.because}", soft_wrap=True)
    out.print(headed("recipe", proposal.words()), soft_wrap=True)
    out.print(f"  because {proposal.reason}", soft_wrap=True)
    model = "" if report.family == BASES[EMBEDDED] else " --model MODEL"
    draw = f"cmlora generate --recipe {recipe or 'advice.json'}{model}"
    how = draw if recipe else f"write it with --recipe advice.json, then {draw}"
    out.print(f"  to draw it: {how}", soft_wrap=True, markup=False)
