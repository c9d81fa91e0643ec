"""`cmlora merge`: several LoRA files become one."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cmlora.cli import arguments, options
from cmlora.cli.console import emit, progress
from cmlora.cli.learned import LEARNERS, Task, learned
from cmlora.cli.pictures import draw_merge, drawable
from cmlora.cli.told import tell
from cmlora.cli.whole import is_model, whole
from cmlora.errors import CmloraError

_MEANING = {
    "sum": "weights add up: n copies of a LoRA at 1/n are the LoRA",
    "average": "weights are strengths in a mean: n copies of a LoRA at 1 are the LoRA",
    "other": "weights are only relative: try several",
}


def merge(
    loras: Annotated[list[str], typer.Argument(help="PATH_OR_ID or PATH_OR_ID:WEIGHT.")],
    output: Annotated[
        Path,
        typer.Option("--out", "-o", help="The .safetensors file to write.", show_default=False),
    ],
    method: Annotated[str, typer.Option(help="How, for example svd, ties, knots_ties.")] = "svd",
    rank: Annotated[
        int | None, typer.Option(help="Largest rank in the result; the method's choice if empty.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="One number per LoRA, separated by commas, instead of :WEIGHT.")
    ] = "",
    density: Annotated[
        float | None, typer.Option(help="Share of entries kept; short for --option density=.")
    ] = None,
    option: options.Settings = None,
    calib: Annotated[
        Path | None, typer.Option(help="What cmlora calib wrote, for methods that need inputs.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="For methods that learn: emoji, a folder, a file, or a hub id.")
    ] = "emoji",
    objective: Annotated[
        str,
        typer.Option(
            help="What is learnt: distill, clip_score, clip_entropy, denoise_mse with --refs."
        ),
    ] = "distill",
    prompt: Annotated[
        list[str] | None, typer.Option(help="To learn at; each LoRA's trigger word if empty.")
    ] = None,
    refs: Annotated[
        Path | None, typer.Option(help="A folder of pictures, for denoise_mse.")
    ] = None,
    questions: Annotated[
        int, typer.Option(help="Denoising steps that are learnt at, per LoRA or picture.")
    ] = 4,
    control: Annotated[
        bool, typer.Option("--control/--no-control", help="Learn on random LoRAs too.")
    ] = True,
    matching: Annotated[
        bool, typer.Option("--match/--no-match", help="Bring the units of two models into step.")
    ] = True,
    separate: Annotated[
        float | None,
        typer.Option(help="Share of the units of two models that either keeps: wider layers."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Size of the merge of two models over one of them, 1 or more: the units that "
            "match worst are kept by either."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of methods that draw random numbers.")] = 0,
    name: Annotated[str, typer.Option(help="Of the result; the output's stem if empty.")] = "",
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw what of each LoRA is in it, by block, into this .png or .svg."),
    ] = None,
    lora_dir: options.LoRAFolder = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Merge LoRA files into one that any diffusers pipeline loads, and say how exact it is.

    The methods lorahub, atlas, concrete and ziplora_trained learn the merge on a model. Two folders
    of models instead of LoRAs become a third one, by mean or pleas.

    Example: [bold]cmlora merge a.safetensors:0.8 b.safetensors:0.6 --method ties --rank 32 -o c.safetensors[/bold]
    """  # noqa: E501
    from cmlora.adapters.merging import MERGES
    from cmlora.adapters.merging import merge as combine
    from cmlora.files import read, sha256, write
    from cmlora.pipelines.library import adapter_name, find
    from cmlora.pipelines.models import EMBEDDED

    drawable(plot, force)
    if any(map(is_model, loras)):
        if plot is not None:
            raise CmloraError(
                "--plot is for LoRAs; compare models with cmlora analyze align --plot"
            )
        whole(
            loras,
            output,
            method,
            prompts=prompt or (),
            separate=separate or 0.0,
            budget=budget,
            matching=matching,
            seed=seed,
            force=force,
            as_json=as_json,
        )
        return
    for flag, value in (("--separate", separate), ("--budget", budget)):
        if value is not None:
            raise CmloraError(f"{flag} is for two models; LoRAs of one base have no units to match")
    learns = method in LEARNERS
    if not learns and MERGES[method].object.needs_grams and calib is None:
        raise CmloraError(f"{method} needs calibration data: --calib FILE, from cmlora calib")
    writable(output, force)
    paths, strengths = _inputs(loras, weights)
    sources: dict[str, Path] = {}
    for reference in paths:
        path = find(reference, model=EMBEDDED, folder=lora_dir)
        if output.exists() and output.samefile(path):
            raise CmloraError(f"{output} is one of the files to merge")
        sources[adapter_name(path, sources)] = path
    settings: dict[str, Any] = dict(arguments.pairs("--option", option or ()))
    if density is not None:
        settings["density"] = density
    if learns:
        task = Task(model, objective, prompt or (), refs, control, questions)
        learned(
            task,
            method,
            sources,
            strengths,
            output,
            name=name or output.stem,
            rank=rank,
            seed=seed,
            settings=settings,
            plot=plot,
            as_json=as_json,
        )
        return
    found = [replace(read(path), name=own) for own, path in sources.items()]
    grams = None if calib is None else _grams(calib, sources)
    with progress("merging", 1) as bar:
        result = combine(
            found,
            strengths,
            method,
            name=name or output.stem,
            rank=rank,
            seed=seed,
            grams=grams,
            advance=lambda i, n: bar.update(bar.task_ids[0], completed=i, total=n),
            **settings,
        )
    recipe = json.loads(result.lora.metadata["cmlora.merge"])
    recipe["sha256"] = [sha256(sources[own]) for own in recipe["loras"]]
    metadata = {**result.lora.metadata, "cmlora.merge": json.dumps(recipe, sort_keys=True)}
    write(replace(result.lora, metadata=metadata), output)
    report = result.report
    draw_merge(plot, f"{method} of {', '.join(sources)}", result.lora, found, report.errors)
    if as_json:
        emit({"file": str(output), "sha256": sha256(output), "recipe": recipe, **asdict(report)})
        return
    tell(report, output, f"{method} of {', '.join(sources)}", _MEANING[report.kind])


def _grams(calib: Path, sources: Mapping[str, Path]) -> dict[str, Mapping[str, Any]]:
    """Second moments by the names that the LoRAs have here, which may not be those they had."""
    from cmlora.adapters.calibration import load
    from cmlora.files import sha256

    known = load(calib)
    own = {name: known.name_of(name, sha256(path)) for name, path in sources.items()}
    return {name: known.grams(other) for name, other in own.items()}


def writable(output: Path, force: bool) -> None:
    """Raises `CmloraError` unless a safetensors file can be put there."""
    if output.suffix != ".safetensors":
        raise CmloraError(f"--out {output} should end in .safetensors, which is what is written")
    if output.exists() and not force:
        raise CmloraError(f"{output} exists; --force replaces it")
    if not output.parent.is_dir():
        raise CmloraError(f"the folder {output.parent} does not exist")


def _inputs(loras: list[str], weights: str) -> tuple[list[str], list[float]]:
    found = [arguments.weighted(text) for text in loras]
    references, strengths = [name for name, _ in found], [weight for _, weight in found]
    if weights:
        if references != loras:
            raise CmloraError("give weights as PATH:WEIGHT or with --weights, not both")
        try:
            strengths = [float(number) for number in arguments.listed(weights)]
        except ValueError:
            strengths = [math.nan]
        if not all(map(math.isfinite, strengths)):
            raise CmloraError(f"--weights {weights!r}: expected numbers separated by commas")
        if len(strengths) != len(references):
            counts = f"{len(strengths)} weights for {len(references)} LoRAs"
            raise CmloraError(f"--weights {weights!r}: {counts}; give one each")
    return references, strengths
