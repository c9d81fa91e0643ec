"""`cmlora calib`: what a model's layers see with each LoRA, measured once for everybody."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from cmlora.cli import arguments, options
from cmlora.cli.console import emit, out, progress, quiet_libraries, status
from cmlora.cli.merge import writable


def calib(
    loras: Annotated[
        list[str] | None, typer.Argument(help="LoRA files, or ids of embedded LoRAs.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--out", "-o", help="The .safetensors file to write.")
    ] = Path("calib.safetensors"),
    model: options.Model = "emoji",
    config: options.Config = None,
    lora_dir: options.LoRAFolder = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="For all runs; may be repeated. Each LoRA's trigger word if empty."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Such as 0-3 or 1,5,9.")] = "0",
    steps: options.Steps = 4,
    guidance: options.Guidance = None,
    every: Annotated[
        bool, typer.Option("--all", help="Keep all layers, to compress the model.")
    ] = False,
    device: options.Device = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure what the layers of a model see, alone and with each LoRA; others read the file.

    Example: [bold]cmlora calib character_1 style_1 --steps 4 -o calib.safetensors[/bold]
    """
    from cmlora.adapters.calibration import save
    from cmlora.pipelines.calibrate import calibrate
    from cmlora.pipelines.native import native_guidance
    from cmlora.pipelines.render import assemble

    writable(output, force)
    columns = arguments.seeds(seeds)
    quiet_libraries()
    with status("loading"):
        pipe = assemble(
            model, [(x, 1.0) for x in loras or ()], folder=lora_dir, device=device, config=config
        )
    scale = native_guidance(pipe) if guidance is None else guidance
    texts = len(prompt or ())
    runs = (len(pipe.loras) + 1) * texts if texts else 2 * len(pipe.loras)
    with progress("measuring", runs * len(columns)) as bar:
        found = calibrate(
            pipe,
            prompt or (),
            steps=steps,
            seeds=columns,
            everything=every,
            advance=lambda: bar.advance(bar.task_ids[0]),
            guidance_scale=scale,
        )
    with status("writing"):
        save(found, output)
    counts = {name or "the model alone": len(table) for name, table in found.seen.items()}
    size = output.stat().st_size
    if as_json:
        emit({"file": str(output), "bytes": size, "modules": counts, "about": dict(found.about)})
        return
    table = Table("measured with", Column("modules", justify="right"), title=str(output))
    for name, count in counts.items():
        table.add_row(name, str(count))
    out.print(table)
    out.print(f"{output}: {size / 2**20:.1f} MB", soft_wrap=True)
