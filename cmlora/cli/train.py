"""`cmlora train`: an adapter, or a denoiser, from a folder of pictures."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cmlora.cli.arguments import pairs
from cmlora.cli.console import emit, err, out, progress, quiet_libraries
from cmlora.cli.options import AsJson, Device
from cmlora.cli.options import Config as Layout
from cmlora.errors import CmloraError


def train(
    config: Annotated[
        str | None, typer.Argument(help="TOML file with settings; options here overrule it.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder of pictures with captions.")] = None,
    output: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder for everything that is written.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="emoji, a diffusers folder, a .safetensors file, a hub id.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the adapter and its file.")] = None,
    trigger: Annotated[str | None, typer.Option(help="Word that calls the concept.")] = None,
    tuner: Annotated[str | None, typer.Option(help="How the update is parametrised.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the update.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="Ends of the names of layers, separated by commas.")
    ] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels, of a square.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of the optimizer.")] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures per process and pass.")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    optim: Annotated[str | None, typer.Option(help="Optimizer.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    base_format: Annotated[
        str | None, typer.Option(help="mxfp4 keeps the frozen base in 4 bits.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train the denoiser itself.")] = False,
    trp: Annotated[
        bool, typer.Option("--trp", help="With --full: pull the weights towards low rank.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of any setting, options.KEY of the tuner's."),
    ] = None,
    layout: Layout = None,
    device: Device = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="List all settings with their defaults and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter on a folder of pictures; interrupted, it continues when called again.

    Example: [bold]cmlora train --data cat --trigger zorbo --resolution 64 --out cat_lora[/bold]
    """
    from cmlora.adapters.training import settings as known

    if explain:
        _explain(as_json)
        return
    given: dict[str, Any] = {
        "data": data,
        "output": output,
        "model": model,
        "name": name,
        "trigger": trigger,
        "tuner": tuner,
        "rank": rank,
        "targets": targets,
        "resolution": resolution,
        "steps": steps,
        "batch": batch,
        "rate": rate,
        "optim": optim,
        "seed": seed,
        "base_format": base_format,
        "full": full or None,
        "trp": trp or None,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    for key, text in pairs("--set", settings or []).items():
        changes[key] = known.value(text)
    chosen = known.read(config, changes)
    if not chosen.data:
        raise CmloraError("train: data is missing; give --data FOLDER with pictures")
    facts = _carried_out(chosen, layout, device)
    if as_json:
        emit(facts)
        return
    out.print(
        f"{facts['file']}: {facts['trained']} numbers trained, loss {facts['first_loss']:.4g} -> "
        f"{facts['last_loss']:.4g}"
    )


def _carried_out(chosen: Any, layout: str | None, device: str | None) -> dict[str, Any]:
    from torch import float32

    from cmlora.adapters.training.optim import OPTIMIZERS
    from cmlora.adapters.training.pictures import read_folder
    from cmlora.adapters.training.samples import draw_prior
    from cmlora.adapters.training.trainer import Trainer
    from cmlora.adapters.tuners import TUNERS
    from cmlora.pipelines.models import open_pipeline, read_device

    if not chosen.full:
        assert TUNERS[chosen.tuner]
    assert OPTIMIZERS[chosen.optim]
    examples = read_folder(chosen.data, chosen.trigger)
    quiet_libraries()
    # said for every part: left alone, text encoders come in the file's precision, the rest does not
    pipe = open_pipeline(chosen.model, dtype=float32, **({"config": layout} if layout else {}))
    place = read_device(device)
    if place is not None:
        pipe.to(place)
    prior: Any = ()
    if chosen.prior_data:
        made = draw_prior(pipe, chosen, Path(chosen.prior_data))
        if made:
            err.print(f"{made} pictures of the class were drawn to {chosen.prior_data}")
        prior = read_folder(chosen.prior_data, chosen.prior_prompt)
    trainer = Trainer(pipe, chosen, examples, prior)
    with progress(f"training {chosen.name}", chosen.steps) as bar:
        task = bar.task_ids[0]

        def show(step: int, loss: float) -> None:
            bar.update(task, completed=step, description=f"{chosen.name} loss {loss:.4f}")

        outcome = trainer.run(show)
    tenth = max(1, len(outcome.losses) // 10)
    first, last = outcome.losses[:tenth], outcome.losses[-tenth:]
    return {
        "file": str(outcome.path),
        "trained": outcome.trained,
        "steps": chosen.steps,
        "first_loss": sum(first) / max(1, len(first)),
        "last_loss": sum(last) / max(1, len(last)),
    }


def _explain(as_json: bool) -> None:
    from dataclasses import asdict

    from cmlora.adapters.training.settings import EXPLAINED, Settings

    defaults = asdict(Settings())
    rows = {key: {"default": defaults[key], "what": EXPLAINED[key]} for key in defaults}
    if as_json:
        emit(rows)
        return
    table = Table("setting", "default", "what it is")
    for key, row in rows.items():
        table.add_row(key, str(row["default"]), row["what"])
    out.print(table)
