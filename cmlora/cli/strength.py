"""`cmlora analyze strength`: how strong LoRAs may be before layers leave the model's own range."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Column, Table

from cmlora.cli import arguments
from cmlora.cli.console import emit, err, headed, out, status
from cmlora.errors import CmloraError


def strength(
    references: Sequence[str],
    *,
    calib: Path | None,
    folder: str | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Say for every LoRA, and all at their weights, the largest safe strength and where it is."""
    from cmlora.adapters.analysis.chart import Chart
    from cmlora.adapters.analysis.saturation import advise, saturation, to_json
    from cmlora.adapters.calibration import load
    from cmlora.files import read
    from cmlora.lora import LoRA
    from cmlora.pipelines.library import adapter_name, find
    from cmlora.pipelines.models import EMBEDDED

    if calib is None:
        raise CmloraError(
            "strength is measured on a model's inputs: --calib FILE, from cmlora calib"
        )
    weighted = [arguments.weighted(reference) for reference in references]
    loras: list[LoRA] = []
    weights: dict[str, float] = {}
    for reference, weight in weighted:
        path = find(reference, model=EMBEDDED, folder=folder)
        name = adapter_name(path, weights)
        weights[name] = weight
        loras.append(replace(read(path), name=name))
    with status("measuring"):
        found = saturation(load(calib), loras, list(weights.values()))
    if plot is not None:
        lines = {
            row.name: [min(own.safest, 10.0) for own in row.layers.values()]
            for row in found
            if len(row.layers) == len(found[0].layers)
        }
        places = [float(i) for i in range(len(found[0].layers))]
        Chart("safe strength by layer, cut at 10", places, lines).save(plot)
        err.print(f"wrote {plot}")
    if as_json:
        emit(to_json(found))
        return
    right = [Column(name, justify="right") for name in ("safe strength", "attention rank")]
    table = Table("LoRA", *right, "first layer to go")
    for row in found:
        ranks = [pair for pair in row.ranks.values()]
        both = [sum(column) / len(ranks) for column in zip(*ranks, strict=True)]
        rank = f"{both[0]:.1f} to {both[1]:.1f}" if both else "-"
        safest = f"{row.safest:.2f}" if math.isfinite(row.safest) else "any"
        table.add_row(row.name, safest, rank, row.where)
    out.print(table)
    for advice in advise(found, weights):
        out.print(headed(advice.topic, advice.do), soft_wrap=True)
        out.print(f"  because {advice.because}", soft_wrap=True)
