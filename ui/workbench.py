"""LoRA files in, LoRA files out: inspect, merge, compress and convert, as the command line does."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cmlora import checks, container
from cmlora.adapters.compression import RULES
from cmlora.adapters.compression.resize import resize
from cmlora.adapters.merging import MERGES
from cmlora.adapters.merging import merge as combine
from cmlora.errors import CmloraError
from cmlora.files import describe, read, sha256, write
from cmlora.lora import LoRA, stack
from cmlora.pipelines import library
from cmlora.ui.order import check_strengths
from cmlora.ui.shelf import unknown
from cmlora.ui.studio import Studio, without_path
from cmlora.ui.uploads import plain_name

RANK = 1024
"""The largest rank that can be asked for."""


@dataclass(frozen=True)
class Made:
    """A file that was written.

    Args:
        name: of the new LoRA in the list.
        path: of the file.
        facts: what to say about it, in words by title.
    """

    name: str
    path: Path
    facts: Mapping[str, str]


def inspect(studio: Studio, model: str, name: str) -> dict[str, str]:
    """What a LoRA file is, in words by title.

    Raises:
        CmloraError: if it is not there, or cannot be read at all.
    """
    path = studio.lora_path(name, model)
    facts = _plainly(path, lambda: describe(path))
    facts["file"] = path.name
    return {key: _words(value) for key, value in facts.items()}


def missing(method: str, count: int) -> str:
    """What a merging method needs and has not been given; empty if it can begin.

    Args:
        method: a key of `MERGES`.
        count: how many LoRAs are selected.

    >>> missing("ties", 1)
    'select two or more LoRAs'
    >>> missing("ties", 2)
    ''
    """
    if method not in MERGES:
        return unknown("merging method", method, MERGES)
    found = MERGES[method].object
    if found.needs_grams:
        return (
            f"{method} needs calibration data: measure it with cmlora calib and merge with --calib"
        )
    if count < 2:
        return "select two or more LoRAs"
    if count > 2 and "many" not in found.promises:
        return f"{method} merges exactly two LoRAs, and {count} are selected"
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
        advance: called before every module with its number and the count of modules.

    Raises:
        CmloraError: if something is missing or the files do not fit each other.
    """
    loras = check_strengths(loras, studio.settings.limits)
    problem = missing(method, len(loras))
    if problem:
        raise CmloraError(problem)
    sources: dict[str, Path] = {}
    for reference in loras:
        path = studio.lora_path(reference, model)
        sources[library.adapter_name(path, sources)] = path
    found = [replace(_read(path), name=own) for own, path in sources.items()]
    target = _target(studio, name or f"{method}_{'_'.join(sources)}")
    given: dict[str, Any] = dict(options or {})
    result = combine(
        found,
        list(loras.values()),
        method,
        name=target.stem,
        rank=_rank(rank),
        advance=advance,
        **given,
    )
    recipe = json.loads(result.lora.metadata["cmlora.merge"])
    recipe["sha256"] = [sha256(sources[own]) for own in recipe["loras"]]
    metadata = {**result.lora.metadata, "cmlora.merge": json.dumps(recipe, sort_keys=True)}
    _write(replace(result.lora, metadata=metadata), target)
    report = result.report
    facts = {
        "distance from the exact sum": f"{report.error:.2%}",
        "rank": str(report.rank),
        **{key: f"{share:.1%} of entries" for key, share in report.notes.items()},
        **({"notes": "; ".join(report.warnings)} if report.warnings else {}),
    }
    return Made(target.stem, target, {**facts, **_sized(target)})


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
    resized = resize(_read(path), entry.object, kept, torch.half if half else None)
    target = _target(studio, f"{path.stem}_{rule}")
    _write(resized.lora, target)
    ranks = [change.after for change in resized.changes.values()]
    share = target.stat().st_size / path.stat().st_size
    facts = {
        "lost of the update's norm": f"{resized.error:.2%}",
        "rank": f"{min(ranks)} to {max(ranks)}",
        "of the bytes": f"{share:.0%}",
    }
    return Made(target.stem, target, {**facts, **_sized(target)})


def convert(studio: Studio, model: str, name: str, rank: Any = None) -> Made:
    """Write any LoRA file, or an adapter of another kind, as an ordinary LoRA.

    Args:
        studio: the server's.
        model: whose LoRA it is; adapters that depend on the weights are exported from it.
        name: of the file.
        rank: the largest of a layer; exact if empty.

    Raises:
        CmloraError: if the file cannot be read or exported.
    """
    path, most = studio.lora_path(name, model), _rank(rank)
    shapes = _plainly(path, lambda: container.header(path)).shapes
    if any("lora_A" in key or "lora_down" in key for key in shapes):
        lora, error = _smaller(_read(path), most)
    else:
        lora, error = _plainly(path, lambda: _exported(studio, model, path, most))
    target = _target(studio, f"{path.stem}_lora")
    _write(lora, target)
    ranks = [update.rank for update in lora.updates.values()]
    facts = {
        "modules": str(len(ranks)),
        "rank": f"{min(ranks)} to {max(ranks)}",
        "relative error": f"{error:.2e}",
    }
    return Made(target.stem, target, {**facts, **_sized(target)})


def _smaller(lora: LoRA, rank: int | None) -> tuple[LoRA, float]:
    if rank is None:
        return lora, 0.0
    cut = lora.truncate(rank)
    norm = lora.norm()
    return cut, stack([(lora, 1.0), (cut, -1.0)], "lost").norm() / norm if norm else 0.0


def _exported(studio: Studio, model: str, path: Path, rank: int | None) -> tuple[LoRA, float]:
    from cmlora.adapters.tuners import TUNERS, store
    from cmlora.adapters.tuners.export import to_lora
    from cmlora.pipelines.models import open_pipeline

    assert TUNERS  # the table makes the tuners known to PEFT
    store.read(path)
    pipe = open_pipeline(studio.model_place(model))
    store.load(pipe, path, "converted")
    lora, error = to_lora(pipe, "converted", rank)
    return replace(lora, name=path.stem), error


def _target(studio: Studio, wish: str) -> Path:
    """A new file among the server's own LoRAs."""
    studio.uploads.mkdir(parents=True, exist_ok=True)
    name, number = plain_name(wish, "merged"), 1
    target = studio.uploads / f"{name}.safetensors"
    while target.exists():
        number += 1
        target = studio.uploads / f"{name}-{number}.safetensors"
    return target


def _read(path: Path) -> LoRA:
    lora: LoRA = _plainly(path, lambda: read(path))
    return lora


def _write(lora: LoRA, target: Path) -> None:
    _plainly(target, lambda: write(lora, target))


def _plainly(path: Path, act: Callable[[], Any]) -> Any:
    """What the act gives; its refusals without the place of the file."""
    try:
        return act()
    except CmloraError as error:
        raise CmloraError(without_path(str(error), path)) from None


def _rank(value: Any) -> int | None:
    if value in (None, "", 0):
        return None
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    checks.whole("request", "rank", number, 1, RANK)
    return int(number)


def _sized(path: Path) -> dict[str, str]:
    return {"file": f"{path.name}, {path.stat().st_size / 2**20:.2f} MB"}


def _words(value: Any) -> str:
    """A JSON value as a person reads it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_words(inner)}" for key, inner in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value)) or "-"
    return "-" if value in (None, "") else str(value)
