"""`cmlora profile`: measure which LoRA draws detail and which draws layout, and write it down."""

import math
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from cmlora.cli import arguments, options
from cmlora.cli.console import emit, out, progress, quiet_libraries, status
from cmlora.errors import CmloraError


def profile(
    loras: Annotated[list[str], typer.Argument(help="LoRA files, or ids of embedded LoRAs.")],
    model: options.Model = "emoji",
    config: options.Config = None,
    lora_dir: options.LoRAFolder = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Again for each prompt; the trigger words if empty.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Such as 0-3 or 1,5,9.")] = "0-1",
    steps: options.Steps = 30,
    guidance: options.Guidance = None,
    card: Annotated[
        bool, typer.Option("--card/--no-card", help="Write NAME.profile.json beside each file.")
    ] = True,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure the frequency profile of LoRAs on a model; `generate` and `compare` then use it.

    Example: [bold]cmlora profile character_1 style_1 --no-card[/bold]
    """
    from cmlora.frequency.card import write_card
    from cmlora.frequency.profile import measure
    from cmlora.pipelines.native import native_guidance
    from cmlora.pipelines.render import assemble

    if steps < 1:
        raise CmloraError(f"--steps {steps}: at least 1")
    columns = arguments.seeds(seeds)
    quiet_libraries()
    with status("loading"):
        pipe = assemble(
            model, [(name, 1.0) for name in loras], folder=lora_dir, device=device, config=config
        )
    found = {}
    with progress("profiling", len(pipe.loras)) as bar:
        for name, lora in pipe.loras.items():
            texts = list(prompt or lora.applied.triggers[:1])
            if not texts:
                raise CmloraError(f"no --prompt, and {lora.path.name} names no trigger words")
            found[name] = measure(
                pipe.pipe,
                name,
                texts,
                steps=steps,
                seeds=columns,
                guidance_scale=native_guidance(pipe) if guidance is None else guidance,
            )
            if card:
                write_card(lora.path, found[name])
            bar.advance(bar.task_ids[0])
    if as_json:
        emit({name: {**asdict(p), "frequency": _share(p.frequency)} for name, p in found.items()})
        return
    table = Table("LoRA", "high-frequency share", "acts from", "to", title=f"on {model}")
    for name, measured in sorted(found.items(), key=lambda pair: -(_share(pair[1].frequency) or 0)):
        share = _share(measured.frequency)
        first, last = (f"{edge:.0%}" for edge in measured.window)
        table.add_row(name, "does nothing" if share is None else f"{share:.3f}", first, last)
    out.print(table)


def _share(value: float) -> float | None:
    """`None` for a LoRA that contributed nothing, which has no frequency."""
    return value if math.isfinite(value) else None
