"""`cmlora analyze align`: whether two LoRAs, or two models, can become one."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from cmlora.cli.console import emit, err, out, progress, quiet_libraries, status
from cmlora.cli.whole import is_model
from cmlora.errors import CmloraError

_HOW = {
    "none": "as they are",
    "permute": "rank units reordered",
    "procrustes": "rank units rotated",
    "canon": "canonical factors",
}


def align(
    references: Sequence[str],
    *,
    model: str | None,
    prompts: Sequence[str],
    points: int,
    follow: int,
    folder: str | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Compare two LoRA files, on a model if one is named; or two model folders."""
    if len(references) != 2:
        raise CmloraError(f"align compares two LoRAs or two models, not {len(references)}")
    models = [is_model(reference) for reference in references]
    if all(models):
        result = _models(references, prompts, points, follow, plot, as_json)
    elif any(models):
        raise CmloraError("a LoRA is compared with a LoRA, a model with a model")
    else:
        if follow:
            raise CmloraError("--follow is for two models; LoRAs of one base need no reordering")
        result = _loras(references, model, prompts, points, folder, plot, as_json)
    if as_json:
        emit(result)


def _loras(
    references: Sequence[str],
    model: str | None,
    prompts: Sequence[str],
    points: int,
    folder: str | None,
    plot: Path | None,
    as_json: bool,
) -> dict[str, Any]:
    from dataclasses import replace

    from cmlora.adapters.analysis.chart import Chart
    from cmlora.adapters.analysis.heatmap import Heatmap
    from cmlora.adapters.analysis.merging import Barrier, barrier, mergeability
    from cmlora.adapters.analysis.mismatch import check_families
    from cmlora.files import read
    from cmlora.lora import stack
    from cmlora.pipelines.library import adapter_name, find
    from cmlora.pipelines.models import EMBEDDED

    paths: dict[str, Path] = {}
    for reference in references:
        path = find(reference, model=EMBEDDED, folder=folder)
        paths[adapter_name(path, paths)] = path
    with status("comparing"):
        one, other = (replace(read(path), name=name) for name, path in paths.items())
        check_families([one, other])
        found = mergeability(one, other)
    result: dict[str, Any] = {
        "loras": list(paths),
        "cosine": found.cosine,
        "score": found.score,
        "factors": found.factors,
        "blocks": {block: row._asdict() for block, row in found.blocks.items()},
    }
    hill: Barrier | None = None
    if model is not None:
        from cmlora.pipelines.native import native_guidance
        from cmlora.pipelines.objectives import distill
        from cmlora.pipelines.render import assemble

        quiet_libraries()
        with status("loading"):
            pipe = assemble(model, [])
        said = {name: list(prompts) for name in paths} if prompts else None
        with status("asking the model"):
            scale = native_guidance(pipe)
            objective = distill(pipe, [one, other], prompts=said, guidance_scale=scale)
        with progress("on the way", points) as bar:

            def loss(t: float) -> float:
                bar.advance(bar.task_ids[0])
                return objective.value(stack([(one, 1 - t), (other, t)], "between"))

            hill = barrier(loss, points)
        result["barrier"] = {**asdict(hill), "height": hill.height}
    if plot is not None:
        rows = tuple((row.cosine, row.score) for row in found.blocks.values())
        title = f"{one.name} and {other.name}"
        drawn = Heatmap(title, tuple(found.blocks), ("cosine", "score R"), rows).drawing()
        if hill is not None:
            way = Chart("loss on the way between them", hill.places, {"loss": hill.losses})
            drawn = drawn.above(way.drawing())
        drawn.save(plot)
        err.print(f"wrote {plot}")
    if as_json:
        return result
    right = [Column(name, justify="right") for name in ("cosine", "score R")]
    table = Table("block", *right, title=f"{one.name} and {other.name}")
    for block, row in found.blocks.items():
        table.add_row(block, f"{row.cosine:+.3f}", f"{row.score:+.3f}")
    table.add_row("all", f"{found.cosine:+.3f}", f"{found.score:+.3f}")
    out.print(table)
    for how, lost in found.factors.items():
        out.print(f"factors averaged {_HOW[how]}: {lost:.1%} from the mean", highlight=False)
    if not found.factors:
        out.print("their ranks differ: factors cannot be averaged, merge updates instead")
    if "barrier" in result:
        out.print(f"barrier {result['barrier']['height']:.3g}; the model alone has loss 1")
    return result


def _models(
    references: Sequence[str],
    prompts: Sequence[str],
    points: int,
    follow: int,
    plot: Path | None,
    as_json: bool,
) -> dict[str, Any]:
    import torch

    from cmlora.adapters.analysis.chart import Chart
    from cmlora.pipelines.models import open_pipeline
    from cmlora.pipelines.whole import align as compare

    quiet_libraries()
    with status("loading"):
        folders = [Path(reference).expanduser() for reference in references]
        pipes = [open_pipeline(folder, dtype=torch.float32) for folder in folders]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    with status("matching"):
        found = compare(pipes[0], pipes[1], prompts, points=points, follow=follow)
    sides = {"before": found.before, "after": found.after}
    if plot is not None:
        lines = {f"{name} matching": way.barrier.losses for name, way in sides.items()}
        Chart("loss on the way between two models", found.before.barrier.places, lines).save(plot)
        err.print(f"wrote {plot}")
    result = {
        name: {
            "distance": way.distance,
            "score": way.score,
            "barrier": {**asdict(way.barrier), "height": way.barrier.height},
        }
        for name, way in sides.items()
    }
    if not as_json:
        right = [Column(name, justify="right") for name in ("distance", "score R", "barrier")]
        table = Table("units", *right, title=" and ".join(references))
        for name, way in sides.items():
            numbers = f"{way.distance:.3f}", f"{way.score:+.3f}", f"{way.barrier.height:.3g}"
            table.add_row(f"{name} matching", *numbers)
        out.print(table)
        moved = sum(found.moved.values()) / max(len(found.moved), 1)
        out.print(f"{moved:.0%} of the units changed places")
    return {**result, "moved": found.moved}
