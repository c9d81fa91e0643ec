"""LoRA files in, LoRA files out: inspect, merge, compress and convert, as the command line does."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmlora import checks, container, files, keys
from cmlora.adapters.compression import RULES
from cmlora.adapters.compression.resize import resize
from cmlora.adapters.merging import MERGES
from cmlora.adapters.merging import merge as combine
from cmlora.errors import CmloraError
from cmlora.files import describe, sha256
from cmlora.lora import LoRA
from cmlora.ui.calibrations import grams, uncovered
from cmlora.ui.order import check_strengths
from cmlora.ui.shelf import unknown
from cmlora.ui.studio import Studio
from cmlora.ui.writing import Made, new_file, plainly, rank_of, read, sized, sources, write


def inspect(studio: Studio, model: str, name: str) -> dict[str, str]:
    """What a LoRA file is, in words by title.

    Raises:
        CmloraError: if it is not there, or cannot be read at all.
    """
    path = studio.lora_path(name, model)
    facts = plainly(path, lambda: describe(path))
    facts["file"] = path.name
    return {key: _words(value) for key, value in facts.items()}


def missing(method: str, count: int, calib: str = "") -> str:
    """What a merging method needs and has not been given; empty if it can begin.

    Args:
        method: a key of `MERGES`.
        count: how many LoRAs are selected.
        calib: the calibration that is chosen; empty if there is none.

    >>> missing("ties", 1)
    'select two or more LoRAs'
    >>> missing("ties", 2)
    ''
    """
    if method not in MERGES:
        return unknown("merging method", method, MERGES)
    found = MERGES[method].object
    if count < 2:
        return "select two or more LoRAs"
    if count > 2 and "many" not in found.promises:
        return f"{method} merges exactly two LoRAs, and {count} are selected"
    if found.needs_grams and not calib:
        return f"{method} needs calibration data: measure the selected LoRAs below, and choose it"
    return ""


def merge(
    studio: Studio,
    model: str,
    loras: Mapping[str, float],
    method: str,
    *,
    name: str = "",
    rank: Any = None,
    options: Mapping[str, str] | None = None,
    calib: str = "",
    advance: Callable[[int, int], None] | None = None,
) -> Made:
    """Merge LoRAs into a new one among the server's LoRAs.

    Args:
        studio: the server's.
        model: whose LoRAs they are.
        loras: strengths by name.
        method: a key of `MERGES`.
        name: of the result; made of the method and the names if empty.
        rank: the largest in the result; the method's choice if empty.
        options: of the method, as texts.
        calib: name of a calibration, for methods that need one.
        advance: called before every module with its number and the count of modules.

    Raises:
        CmloraError: if something is missing or the files do not fit each other.
    """
    loras = check_strengths(loras, studio.settings.limits)
    problem = missing(method, len(loras), calib)
    if problem:
        raise CmloraError(problem)
    known = None
    if MERGES[method].object.needs_grams:
        left = uncovered(studio, model, loras, calib)
        if left:
            raise CmloraError(f"{calib} knows nothing of {left[0]}; measure the selection again")
        known = grams(studio, model, loras, calib)
    paths = sources(studio, model, loras)
    found = [read(path, own) for own, path in paths.items()]
    target = new_file(studio.uploads, name or f"{method}_{'_'.join(paths)}")
    given: dict[str, Any] = dict(options or {})
    result = combine(
        found,
        list(loras.values()),
        method,
        name=target.stem,
        rank=rank_of(rank),
        grams=known,
        advance=advance,
        **given,
    )
    recipe = json.loads(result.lora.metadata["cmlora.merge"])
    recipe["sha256"] = [sha256(paths[own]) for own in recipe["loras"]]
    metadata = {**result.lora.metadata, "cmlora.merge": json.dumps(recipe, sort_keys=True)}
    write(replace(result.lora, metadata=metadata), target)
    report = result.report
    facts = {
        "distance from the exact sum": f"{report.error:.2%}",
        "rank": str(report.rank),
        **report.remarks,
        **({"notes": "; ".join(report.warnings)} if report.warnings else {}),
    }
    return Made(target.stem, target, {**facts, **sized(target)})


def compress(
    studio: Studio, model: str, name: str, rule: str, keep: Any = None, *, half: bool = False
) -> Made:
    """Make a smaller copy of a LoRA among the server's LoRAs.

    Args:
        studio: the server's.
        model: whose LoRA it is.
        name: of the LoRA.
        rule: a key of `cmlora.adapters.compression.RULES`.
        keep: how much is kept; what that means depends on the rule.
        half: store it in half precision.

    Raises:
        CmloraError: if the file cannot be read, or ``keep`` is not possible.
    """
    import torch

    entry = RULES[rule]
    path = studio.lora_path(name, model)
    kept = None if keep in (None, "", 0) else checks.real("compress", "keep", keep)
    resized = resize(read(path), entry.object, kept, torch.half if half else None)
    target = new_file(studio.uploads, f"{path.stem}_{rule}")
    write(resized.lora, target)
    ranks = [change.after for change in resized.changes.values()]
    share = target.stat().st_size / path.stat().st_size
    facts = {
        "lost of the update's norm": f"{resized.error:.2%}",
        "rank": f"{min(ranks)} to {max(ranks)}",
        "of the bytes": f"{share:.0%}",
    }
    return Made(target.stem, target, {**facts, **sized(target)})


def convert(
    studio: Studio, model: str, name: str, rank: Any = None, *, loose: bool = False
) -> Made:
    """Write any LoRA file, or an adapter of another kind, as an ordinary LoRA.

    Args:
        studio: the server's.
        model: whose LoRA it is; adapters that depend on the weights are exported from it.
        name: of the file.
        rank: the largest of a layer; exact if empty.
        loose: leave out what a LoRA cannot hold, biases and norms.

    Raises:
        CmloraError: if the file cannot be read or exported.
    """
    path, most = studio.lora_path(name, model), rank_of(rank)
    with studio.alone():  # a model may have to be loaded
        lora, error = plainly(path, lambda: _ordinary(studio, model, path, most, loose))
    target = new_file(studio.uploads, f"{path.stem}_lora")
    write(lora, target)
    ranks = [update.rank for update in lora.updates.values()]
    facts = {
        "modules": str(len(ranks)),
        "rank": f"{min(ranks)} to {max(ranks)}",
        "relative error": f"{error:.2e}",
    }
    return Made(target.stem, target, {**facts, **sized(target)})


def _ordinary(
    studio: Studio, model: str, path: Path, rank: int | None, loose: bool
) -> tuple[LoRA, float]:
    """Any adapter as a LoRA, and the relative error; a model is loaded only if it needs one."""
    head = container.header(path)
    layout = keys.layout(head.shapes, shapes=head.shapes)
    tuned = "peft_type" in head.metadata.get("lora_adapter_metadata", "")
    if tuned and (layout.leftover or not layout.modules):
        return _exported(studio, model, path, rank)
    pipe = None
    if files.open_file(path).plain()[1]:
        from torch import float32

        from cmlora.pipelines.models import open_pipeline

        pipe = open_pipeline(studio.model_place(model), dtype=float32)
    return files.convert(path, pipe, rank=rank, strict=not loose)


def _exported(studio: Studio, model: str, path: Path, rank: int | None) -> tuple[LoRA, float]:
    from torch import float32

    from cmlora.adapters.tuners import TUNERS, store
    from cmlora.adapters.tuners.export import to_lora
    from cmlora.pipelines.models import open_pipeline

    assert TUNERS  # the table makes the tuners known to PEFT
    store.read(path)
    pipe = open_pipeline(studio.model_place(model), dtype=float32)
    store.load(pipe, path, "converted")
    lora, error = to_lora(pipe, "converted", rank)
    return replace(lora, name=path.stem), error


def _words(value: Any) -> str:
    """A JSON value as a person reads it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_words(inner)}" for key, inner in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value)) or "-"
    return "-" if value in (None, "") else str(value)
