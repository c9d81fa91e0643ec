"""Passes on one branch of guidance, where a pipeline runs both as the halves of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cmlora import outputs
from cmlora.denoisers import Kind
from cmlora.guided import Side
from cmlora.plan import Pass


def sides(passes: Sequence[Pass], side: Side | None) -> list[Side | None]:
    """What of each pass is run in a call of the denoiser.

    Args:
        passes: of a plan.
        side: what the call holds; ``None`` if nobody knows.

    Returns:
        ``both`` for the whole batch, a half of it, or ``None`` for a pass that is not run because
        its branch is not this call's.
    """
    if side == "both":
        return [single.branch for single in passes]
    # where nothing is known of branches there is the conditional one at least
    other = "cond" if side == "uncond" else "uncond"
    return [None if single.branch == other else "both" for single in passes]


def take(kind: Kind, arguments: Mapping[str, Any], batch: int, side: Side) -> dict[str, Any]:
    """A call's arguments for one half of its batch of B samples."""
    if side == "both":
        return dict(arguments)
    half = _half(kind, batch, side)
    return {name: _part(kind, name, value, batch, half) for name, value in arguments.items()}


def _half(kind: Kind, batch: int, side: Side) -> slice:
    """Where a branch is in a batch of both."""
    middle = batch // 2
    return slice(0, middle) if side == (kind.first or "uncond") else slice(middle, batch)


def _part(kind: Kind, name: str, value: Any, batch: int, half: slice) -> Any:
    if name in kind.unbatched:
        return value
    if isinstance(value, torch.Tensor):
        return value[half] if value.ndim and len(value) == batch else value
    if isinstance(value, list) and name in kind.listed and len(value) == batch:
        return value[half]
    if isinstance(value, list | tuple):
        return type(value)(_part(kind, "", each, batch, half) for each in value)
    if isinstance(value, dict):
        return {key: _part(kind, key, each, batch, half) for key, each in value.items()}
    return value


def complete(kind: Kind, results: Sequence[Any], done: Sequence[Side | None]) -> list[Any]:
    """Outputs of passes that ran in part, with what they lack taken from others.

    Args:
        kind: the denoiser's row; says which half is which.
        results: outputs by pass; ``None`` for one that was not run.
        done: see `sides`.

    Returns:
        Whole outputs. What is missing comes from the first pass that has it.
    """
    if all(side == "both" for side in done):
        return list(results)
    first = next((r for r, side in zip(results, done, strict=True) if side == "both"), None)
    names: tuple[Side, Side] = ("uncond", "cond")
    halves: dict[str, Any] = {}
    for name in names:
        for result, side in zip(results, done, strict=True):
            if side in ("both", name):
                leaf = outputs.leaf(result)
                halves[name] = leaf[_half(kind, len(leaf), name)] if side == "both" else leaf
                break
    if kind.first == "cond":
        names = ("cond", "uncond")
    found = []
    for result, side in zip(results, done, strict=True):
        if side == "both":
            found.append(result)
        elif side is None:
            found.append(first)
        else:
            own = {**halves, side: outputs.leaf(result)}
            found.append(outputs.replace_leaf(result, _joined(own[names[0]], own[names[1]])))
    return found


def joined(unconditional: Any, conditional: Any) -> Any:
    """An output of the denoiser for both branches from one for each, the unconditional first."""
    both = _joined(outputs.leaf(unconditional), outputs.leaf(conditional))
    return outputs.replace_leaf(conditional, both)


def parted(output: Any) -> tuple[Any, Any]:
    """The inverse of `joined`."""
    leaf = outputs.leaf(output)
    half = len(leaf) // 2
    return outputs.replace_leaf(output, leaf[:half]), outputs.replace_leaf(output, leaf[half:])


def _joined(one: Any, other: Any) -> Any:
    if isinstance(one, list):
        return [*one, *other]
    return torch.cat([one, other])
