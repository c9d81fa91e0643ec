"""What `cmlora merge` does with two models instead of LoRAs."""

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from cmlora.cli.console import emit, out, quiet_libraries, status
from cmlora.errors import CmloraError

METHODS = ("mean", "pleas")


def is_model(reference: str) -> bool:
    """Whether this is a diffusers folder."""
    return (Path(reference).expanduser() / "model_index.json").is_file()


def whole(
    references: Sequence[str],
    output: Path,
    method: str,
    *,
    prompts: Sequence[str],
    separate: float,
    matching: bool,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Merge two diffusers folders into a third."""
    if len(references) != 2 or not all(map(is_model, references)):
        raise CmloraError("models are merged two at a time, and not with LoRAs")
    if method not in METHODS:
        raise CmloraError(f"--method {method}: models are merged by {' or '.join(METHODS)}")
    if method == "pleas" and not prompts:
        raise CmloraError("pleas fits the layers to what they see: give a --prompt")
    if method == "mean" and prompts:
        raise CmloraError("--prompt is for pleas; mean looks at weights alone")
    if not 0 <= separate <= 1:
        raise CmloraError(f"--separate {separate:g}: a share from 0 to 1")
    folders = [Path(reference).expanduser() for reference in references]
    if output.suffix:
        raise CmloraError(f"--out {output}: two models become a folder")
    if output.exists() and (not force or any(output.samefile(folder) for folder in folders)):
        raise CmloraError(
            f"{output} exists; " + ("name another" if force else "--force replaces it")
        )
    if not output.absolute().parent.is_dir():
        raise CmloraError(f"the folder {output.absolute().parent} does not exist")

    import torch

    from cmlora.pipelines.calibrate import parts
    from cmlora.pipelines.models import open_pipeline
    from cmlora.pipelines.whole import merge_pipelines, stored_dtype
    from cmlora.pipelines.wider import note

    quiet_libraries()
    with status("loading"):
        pipes = [open_pipeline(folder, dtype=torch.float32) for folder in folders]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    before = {name: _size(model) for name, model in parts(pipes[0]).items()}
    with status("merging"):
        found = merge_pipelines(
            *pipes, prompts=prompts, separate=separate, matching=matching, seed=seed
        )
        note({part: merged.model for part, merged in found.items()})
    with tempfile.TemporaryDirectory(
        prefix=f".{output.name}.", dir=output.absolute().parent
    ) as new:
        part = next(iter(found))
        pipes[0].to(stored_dtype(folders[0], part)).save_pretrained(Path(new) / "model")
        if output.exists():
            shutil.rmtree(output)
        (Path(new) / "model").rename(output)
    facts = {
        part: {
            "matched": _mean(merged.similarity.values()),
            "missed_by_mean": _mean(row[0] for row in merged.residuals.values()),
            "missed": _mean(row[1] for row in merged.residuals.values()),
            "size": _size(merged.model) / before[part],
        }
        for part, merged in found.items()
    }
    if as_json:
        emit({"folder": str(output), "method": method, "parts": facts})
        return
    named = ("units alike", "mean misses", "fit misses", "size")
    right = [Column(name, justify="right") for name in named]
    table = Table("part", *right, title=f"{method} of {' and '.join(map(str, folders))}")
    for part, row in facts.items():
        table.add_row(part, *("-" if value is None else f"{value:.2%}" for value in row.values()))
    out.print(table)
    out.print(str(output), soft_wrap=True)


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _mean(values: Iterable[float]) -> float | None:
    """The mean, or nothing of nothing."""
    rows = list(values)
    return sum(rows) / len(rows) if rows else None
