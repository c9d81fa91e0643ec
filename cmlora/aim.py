"""Which denoisers of a pipeline a LoRA file goes into, where there are several (Wan 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from cmlora.errors import CmloraError
from cmlora.lora import DENOISERS, Update
from cmlora.originals import Target

if TYPE_CHECKING:
    from cmlora.forms import Change
    from cmlora.source import Source


def aimed(source: Source, pipe: Any, into: Sequence[str] = ()) -> Source:
    """A file whose layers are those of the denoisers that it is to go into.

    Files name no denoiser, or always the first: both of Wan 2.2 have layers of the same names, and
    most of its LoRAs come as one file for each. Layers of text encoders stay where they are.

    Args:
        source: an opened file.
        pipe: the pipeline it is meant for.
        into: names of denoisers, see `cmlora.denoisers.chosen`; if empty the file's own names
            decide, except that a pipeline with a ``transformer_2`` alone has nothing else.

    Raises:
        CmloraError: if the pipeline has no such denoiser, or the file has nothing for any, or says
            itself which of its layers is for which.
    """
    present = [name for name in DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)]
    modules = [m for target, _ in source.remainder.changes for m in target.modules]
    components = {module.partition(".")[0] for module in (*source.lora.updates, *modules)}
    named = [name for name in DENOISERS if name in components]
    if not into:
        if named != ["transformer"] or present != ["transformer_2"]:
            return source
        into = present
    for name in into:
        if name not in present:
            held = ", ".join(present) or "none"
            raise CmloraError(
                f"{source.path} cannot go into {name}: {type(pipe).__name__} has no such denoiser; "
                f"it has {held}"
            )
    if not named:
        raise CmloraError(f"{source.path} cannot go into {into[0]}: it changes no denoiser")
    if len(named) > 1:
        raise CmloraError(
            f"{source.path} says itself which layers are for {' and which for '.join(named)}; "
            "leave out which denoisers it goes into"
        )
    old = named[0]
    updates: dict[str, Update] = {}
    for module, update in source.lora.updates.items():
        for place in _places(module, old, into):
            updates[place] = update
    changes: list[tuple[Target, Change]] = []
    keys: list[str] = []
    for (target, change), key in zip(source.remainder.changes, source.remainder.keys, strict=True):
        rows = [_places(module, old, into) for module in target.modules]
        for names in zip(*rows, strict=True):
            changes.append((replace(target, modules=names), change))
            keys.append(key)
    return replace(
        source,
        lora=replace(source.lora, updates=updates),
        remainder=replace(source.remainder, changes=tuple(changes), keys=tuple(keys)),
    )


def _places(module: str, old: str, into: Sequence[str]) -> list[str]:
    """Where one layer of the file goes."""
    component, _, name = module.partition(".")
    return [module] if component != old else [f"{denoiser}.{name}" for denoiser in into]
