"""Passes on one branch of guidance, where a pipeline runs both as the halves of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from cmlora import outputs
from cmlora.denoisers import Kind
from cmlora.plan import Pass

Side = Literal["both", "cond", "uncond"]


def sides(passes: Sequence[Pass], *, doubled: bool, branch: str) -> list[Side | None]:
    """What of each pass is run in a call of the denoiser.

    Args:
        passes: of a plan.
        doubled: whether the call's batch has the unconditional half first and then the other.
        branch: the name a pipeline gives to a call for one branch; it begins with ``cond`` or
            ``uncond``.

    Returns:
        ``both`` for the whole batch, a half of it, or ``None`` for a pass that is not run because
        its branch is not this call's.
    """
    if doubled:
        return [single.branch for single in passes]
    if branch.startswith("uncond"):
        return [None if single.branch == "cond" else "both" for single in passes]
    # where nothing is known of branches there is the conditional one at least
    return [None if single.branch == "uncond" else "both" for single in passes]


def take(kind: Kind, arguments: Mapping[str, Any], batch: int, side: Side) -> dict[str, Any]:
    """A call's arguments for one half of its batch of B samples."""
    if side == "both":
        return dict(arguments)
    return {name: _part(kind, name, value, batch, side) for name, value in arguments.items()}


def _part(kind: Kind, name: str, value: Any, batch: int, side: Side) -> Any:
    half = slice(0, batch // 2) if side == "uncond" else slice(batch // 2, batch)
    if name in kind.unbatched:
        return value
    if isinstance(value, torch.Tensor):
        return value[half] if value.ndim and len(value) == batch else value
    if isinstance(value, list) and name in kind.listed and len(value) == batch:
        return value[half]
    if isinstance(value, list | tuple):
        return type(value)(_part(kind, "", each, batch, side) for each in value)
    if isinstance(value, dict):
        return {key: _part(kind, key, each, batch, side) for key, each in value.items()}
    return value


def complete(results: Sequence[Any], done: Sequence[Side | None]) -> list[Any]:
    """Outputs of passes that ran in part, with what they lack taken from others.

    Args:
        results: outputs by pass; ``None`` for one that was not run.
        done: see `sides`.

    Returns:
        Whole outputs. What is missing comes from the first pass that has it.
    """
    if all(side == "both" for side in done):
        return list(results)
    first = next((r for r, side in zip(results, done, strict=True) if side == "both"), None)
    halves: dict[str, Any] = {}
    for name in ("uncond", "cond"):
        for result, side in zip(results, done, strict=True):
            if side in ("both", name):
                leaf = outputs.leaf(result)
                half = len(leaf) // 2
                whole = side == "both"
                part = leaf[:half] if name == "uncond" else leaf[half:]
                halves[name] = part if whole else leaf
                break
    found = []
    for result, side in zip(results, done, strict=True):
        if side == "both":
            found.append(result)
        elif side is None:
            found.append(first)
        else:
            own = {**halves, side: outputs.leaf(result)}
            found.append(outputs.replace_leaf(result, _joined(own["uncond"], own["cond"])))
    return found


def _joined(one: Any, other: Any) -> Any:
    if isinstance(one, list):
        return [*one, *other]
    return torch.cat([one, other])
