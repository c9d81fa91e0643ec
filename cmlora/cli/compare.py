"""`cmlora compare`: every method on the same LoRAs, prompt and initial latents."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Column, Table

from cmlora.cli import arguments, options
from cmlora.cli.console import emit, err, out, progress, quiet_libraries, status
from cmlora.errors import CmloraError

TITLES = {"instances": "found", "classes": "class", "clip_score": "CLIP"}
"""Short column titles of scores."""


def compare(
    loras: Annotated[
        str, typer.Option(help="PATH_OR_ID or PATH_OR_ID:WEIGHT, separated by commas.")
    ],
    model: options.Model = "emoji",
    config: options.Config = None,
    lora_dir: options.LoRAFolder = None,
    methods: options.Methods = "",
    prompt: options.Prompt = "",
    negative_prompt: options.NegativePrompt = "",
    seeds: Annotated[str, typer.Option(help="Such as 0-3 or 1,5,9.")] = "0-3",
    steps: options.Steps = 30,
    guidance: options.Guidance = None,
    size: options.Size = "",
    cut: options.Cut = "",
    option: options.Settings = None,
    schedule: options.Schedule = "",
    uncond: options.Uncond = "per_lora",
    execution: options.Execution = "sequential",
    device: options.Device = None,
    destination: Annotated[
        Path, typer.Option("--out", help="Folder for pictures, grid.png and results.json.")
    ] = Path("comparison"),
    as_json: options.AsJson = False,
) -> None:
    """Render every method from the same initial latents, with costs and, for emoji, scores.

    Example: [bold]cmlora compare --loras character_1,object_1 --seeds 0-3 --out comparison[/bold]
    """
    columns = arguments.seeds(seeds)
    chosen = [arguments.weighted(text) for text in arguments.listed(loras)]
    if not chosen:
        raise CmloraError("--loras is empty; name at least one LoRA")
    wished: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "options": arguments.pairs("--option", option or ()),
        "cut": arguments.cut(cut),
        "schedule": schedule,
        "uncond": uncond,
        "execution": execution,
        "steps": steps,
        "guidance_scale": guidance,
        "size": arguments.size(size) if size else None,
    }

    from cmlora.eval.comparison import Comparison
    from cmlora.eval.variants import USUAL, read
    from cmlora.pipelines.coefficients import Previews
    from cmlora.pipelines.models import EMBEDDED
    from cmlora.pipelines.render import Wish, assemble

    variants = read(arguments.variants(methods) or USUAL)
    if not methods and model != EMBEDDED:
        variants = tuple(v for v in variants if v.method != "lorahub")
    quiet_libraries()
    with status("loading"):
        pipe = assemble(model, chosen, folder=lora_dir, device=device, config=config)
        wish = Wish(prompt or arguments.prompt_of(pipe), **wished)
        table = Comparison(
            pipe, wish, variants, columns, destination, judge=_judge(model == EMBEDDED)
        )
    if len(variants) < len(USUAL) and not methods:
        err.print("lorahub is left out: there is no score to look for its coefficients with")
    with progress("pictures", len(variants) * len(columns) * steps) as bar:
        search = bar.add_task("coefficients", total=Previews().budget, visible=False)
        for row, one in table.wishes(lambda: bar.update(search, advance=1, visible=True)):
            table.add(row, one, lambda: bar.advance(bar.task_ids[0]))
    with status("scoring"):
        table.score_lines()
        sheet = table.draw()
    if as_json:
        emit({"grid": str(sheet), **table.to_dict()})
    else:
        out.print(_table(table))
        err.print(f"{sheet}\n{destination / 'results.json'}", soft_wrap=True)


def _judge(embedded: bool) -> Any:
    """Who scores the pictures, if anybody can."""
    if not embedded:
        return None
    from cmlora.eval.embedded import judge

    return judge


def _table(comparison: Any) -> Table:
    """Costs, and the scores if there are any, one row per method."""
    names = list(dict.fromkeys(n for line in comparison.lines for n in _numbers(line.scores)))
    titles = ["full", "light", "GMACs", "s", *(TITLES.get(name, name) for name in names)]
    table = Table(
        Column("method", no_wrap=True),
        *(Column(title, justify="right", no_wrap=True) for title in titles),
        title=f"{len(comparison.seeds)} pictures per method, {comparison.wish.steps} steps",
        caption="full and light passes and seconds per picture, GMACs per step",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for line in comparison.lines:
        macs = "-" if line.macs_per_step is None else f"{line.macs_per_step / 1e9:.3g}"
        found = _numbers(line.scores)
        scores = [f"{found[n]:.3g}" if n in found else "-" for n in names]
        costs = (f"{line.full:g}", f"{line.light:g}", macs, f"{line.seconds:.2f}")
        table.add_row(line.variant.label, *costs, *scores)
    return table


def _numbers(scores: Any) -> dict[str, float]:
    """The scores that are single numbers."""
    return {k: float(v) for k, v in scores.items() if isinstance(v, int | float)}
