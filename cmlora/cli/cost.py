"""`cmlora cost`: what every method would cost, before any picture is made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from cmlora.cli import arguments, options
from cmlora.cli.console import emit, out, status
from cmlora.errors import CmloraError


def cost(
    model: Annotated[
        str, typer.Option(help="sd15, sdxl, emoji, a diffusers folder, or a hub id.")
    ] = "sd15",
    loras: Annotated[int, typer.Option(help="How many LoRAs.")] = 5,
    methods: options.Methods = "",
    steps: options.Steps = 30,
    size: options.Size = "",
    guided: Annotated[
        bool, typer.Option("--guided/--no-guided", help="With classifier-free guidance.")
    ] = True,
    cut: options.Cut = "",
    uncond: options.Uncond = "per_lora",
    as_json: options.AsJson = False,
) -> None:
    """Count multiply-accumulates per method, attention included; no weights are loaded.

    Example: [bold]cmlora cost --model sdxl --loras 5 --steps 50[/bold]
    """
    if loras < 1 or steps < 1:
        raise CmloraError("--loras and --steps are at least 1")
    if uncond not in ("per_lora", "shared"):
        raise CmloraError(f"--uncond {uncond}: per_lora or shared")
    with status("counting"):
        result = estimate(
            model,
            loras=loras,
            words=arguments.variants(methods),
            steps=steps,
            size=arguments.size(size) if size else None,
            batch=2 if guided else 1,
            cut=arguments.cut(cut),
            uncond=uncond,
        )
    if as_json:
        emit(result)
        return
    width, height = result["size"]
    table = Table(
        Column("method", no_wrap=True),
        *("full passes", "light passes", "GMACs per step", "of one full pass"),
        title=f"{loras} LoRAs, {steps} steps, {model} at {width}x{height}",
        caption=f"full pass {result['full'] / 1e9:.4g} GMACs, light {result['light'] / 1e9:.4g}",
    )
    for row in result["methods"]:
        ratio = row["macs_per_step"] / result["full"]
        numbers = (row["full"], row["light"], f"{row['macs_per_step'] / 1e9:.4g}", f"{ratio:.2f}x")
        table.add_row(row["label"], *map(str, numbers))
    out.print(table)


def estimate(
    model: str,
    *,
    loras: int,
    words: tuple[str, ...],
    steps: int,
    size: tuple[int, int] | None,
    batch: int,
    cut: tuple[int, int] | None,
    uncond: str = "per_lora",
) -> dict[str, Any]:
    """The command's result: the two passes, and per method what a run adds up to."""
    from cmlora.branches import share_uncond
    from cmlora.caching.policy import parse
    from cmlora.caching.unet import Cut
    from cmlora.cost import pass_macs, plan_cost, shapes
    from cmlora.eval.variants import USUAL, read
    from cmlora.plan import Member
    from cmlora.strategies import schedule

    config, scale = _config(model)
    side = config["sample_size"]
    height_width = side if isinstance(side, list | tuple) else (side, side)
    width, height = size or (height_width[1] * scale, height_width[0] * scale)
    sample, encoder = shapes(config, height, width, batch=batch, scale=scale)
    one = pass_macs(config, sample, encoder, cut=None if cut is None else Cut(*cut))
    members = [Member(f"lora{i + 1}") for i in range(loras)]
    rows = []
    for variant in read(words or USUAL):
        found = {"coefficients": (1.0,) * loras} if variant.method == "lorahub" else {}
        given = {**found, **variant.options}
        plans = schedule(variant.method, members, steps, parse(variant.cache), **given)
        if uncond == "shared" and batch == 2:
            plans = tuple(map(share_uncond, plans))
        run = plan_cost(plans, one.full, one.light if parse(variant.cache).reuse else None)
        counted = {"full": sum(run.full.values()), "light": sum(run.light.values())}
        rows.append({"label": variant.label, **counted, "macs_per_step": run.per_step})
    return {
        "model": model,
        "size": [width, height],
        "steps": steps,
        "loras": loras,
        "full": one.full,
        "light": one.light,
        "methods": rows,
    }


def _config(model: str) -> tuple[Mapping[str, Any], int]:
    """The UNet's configuration and how many pixels a latent cell has."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from cmlora.cost import KNOWN
    from cmlora.pipelines.models import locate

    if model in KNOWN and not Path(model).exists():
        return KNOWN[model], 8
    where = locate(model)
    if isinstance(where, Path) and where.is_file():
        raise CmloraError(f"{where.name}: give --model sd15 or sdxl to count a single file's cost")
    try:
        unet = UNet2DConditionModel.load_config(where, subfolder="unet")
        vae = AutoencoderKL.load_config(where, subfolder="vae")
    except (OSError, json.JSONDecodeError) as failure:
        reason = str(failure).splitlines()[0]
        raise CmloraError(f"{model}: no UNet configuration to count with ({reason})") from None
    return unet, 2 ** (len(vae["block_out_channels"]) - 1)
