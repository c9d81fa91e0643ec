"""What `cmlora merge` does with two models instead of LoRAs."""

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from cmlora import __version__
from cmlora.cli.console import emit, out, quiet_libraries, status
from cmlora.errors import CmloraError

METHODS = ("mean", "pleas")
_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
"""Suffixes of weights in one file; other dots are part of a folder's name."""


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
    budget: float | None,
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
    if budget is not None and not budget >= 1:
        raise CmloraError(f"--budget {budget:g}: the size over that of one model, 1 or more")
    if budget is not None and separate:
        raise CmloraError("--separate and --budget both say how many units are kept; give one")
    folders = [Path(reference).expanduser() for reference in references]
    _check_target(output, folders, force)

    import torch

    from cmlora.pipelines.calibrate import parts
    from cmlora.pipelines.models import fingerprint, open_pipeline
    from cmlora.pipelines.origin import sign
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
            *pipes,
            prompts=prompts,
            separate=separate,
            budget=budget,
            matching=matching,
            seed=seed,
        )
        note({part: merged.model for part, merged in found.items()})
        recipe = {
            "method": method,
            "models": [folder.resolve().name for folder in folders],
            "sha256": [fingerprint(folder) for folder in folders],
            "weights": [0.5, 0.5],
            "match": matching,
            "separate": separate,
            "budget": budget,
            "prompts": list(prompts),
            "seed": seed,
            "cmlora": __version__,
        }
        sign({part: merged.model for part, merged in found.items()}, recipe)
    with tempfile.TemporaryDirectory(
        prefix=f".{output.name}.", dir=output.absolute().parent
    ) as new:
        part = next(iter(found))
        pipes[0].to(stored_dtype(folders[0], part)).save_pretrained(Path(new) / "model")
        _put(Path(new) / "model", output)
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
        emit({"folder": str(output), "method": method, "recipe": recipe, "parts": facts})
        return
    named = ("units alike", "mean misses", "fit misses", "size")
    right = [Column(name, justify="right") for name in named]
    table = Table("part", *right, title=f"{method} of {' and '.join(map(str, folders))}")
    for part, row in facts.items():
        table.add_row(part, *("-" if value is None else f"{value:.2%}" for value in row.values()))
    out.print(table)
    out.print(str(output), soft_wrap=True)


def _check_target(output: Path, folders: Sequence[Path], force: bool) -> None:
    """Raises `CmloraError` unless a model's folder can be put there."""
    if output.suffix.lower() in _FILES:
        raise CmloraError(f"--out {output}: two models become a folder")
    if output.exists():
        here = output.resolve()
        if any(here in (own, *own.parents) for own in (folder.resolve() for folder in folders)):
            raise CmloraError(f"{output} exists, and a model to merge is in it; name another")
        if not is_model(str(output)):
            raise CmloraError(f"{output} exists and is no model's folder; name another")
        if not force:
            raise CmloraError(f"{output} exists; --force replaces it")
    if not output.absolute().parent.is_dir():
        raise CmloraError(f"the folder {output.absolute().parent} does not exist")


def _put(new: Path, output: Path) -> None:
    """Gives a folder its name; what had it before is deleted when that is done, not earlier."""
    target = output.resolve()
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    old = aside / target.name
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(aside)
        if isinstance(error, OSError):
            raise CmloraError(f"cannot write {output}: {error.strerror}") from None
        raise
    shutil.rmtree(aside)


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _mean(values: Iterable[float]) -> float | None:
    """The mean, or nothing of nothing."""
    rows = list(values)
    return sum(rows) / len(rows) if rows else None
