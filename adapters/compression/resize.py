"""A LoRA of lower rank, with the price of it stated module by module."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cmlora.adapters.compression.rule import Cost, Rule
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update


class Change(NamedTuple):
    """What happened to one module.

    Args:
        before: its rank.
        after: its rank now.
        error: Frobenius norm of the difference over the norm before; 0 if nothing was there.
    """

    before: int
    after: int
    error: float


@dataclass(frozen=True)
class Resized:
    """A LoRA that was made smaller.

    Args:
        lora: the result, in the precision of the original.
        changes: by module.
        error: Frobenius norm of the whole difference over the whole norm.
        before: bytes of the factors before.
        after: bytes of the factors now.
    """

    lora: LoRA
    changes: dict[str, Change]
    error: float
    before: int
    after: int


def resize(
    lora: LoRA, rule: Rule, value: float | None = None, dtype: torch.dtype | None = None
) -> Resized:
    """Shrink the spectra of a LoRA's updates by a rule, and rebuild it from what is left.

    A module whose spectrum the rule leaves alone is not touched at all.

    Args:
        lora: any.
        rule: an entry of `cmlora.adapters.compression.RULES`.
        value: the rule's own measure; its default if not given.
        dtype: of the result; that of each module if not given.

    Raises:
        CmloraError: if there is nothing to resize, or the rule refuses the value.
    """
    if not lora.updates:
        raise CmloraError(f"{lora.name} has no updates to compress")
    if value is not None and not math.isfinite(value):
        raise CmloraError(f"a share or rank of {value} is not a finite number")
    whole = {module: canonical(update) for module, update in lora.updates.items()}
    spectra = {module: update.up.square().sum(0) for module, update in whole.items()}
    costs = {module: cost(update) for module, update in lora.updates.items()}
    shrunk = rule(spectra, costs) if value is None else rule(spectra, costs, value)
    updates: dict[str, Update] = {}
    changes: dict[str, Change] = {}
    squares = []
    for module, original in lora.updates.items():
        old, new = spectra[module], shrunk[module]
        stored = dtype or original.up.dtype
        small = _rebuilt(whole[module], old, new, stored)
        changed = stored != original.up.dtype or bool((new < old[: len(new)]).any())
        if numbers(small) < numbers(original) or changed:
            updates[module], lost = small, difference(original, small)
        else:
            updates[module], lost = original, 0.0
        norm = float(torch.linalg.vector_norm(old))
        changes[module] = Change(original.rank, updates[module].rank, lost / norm if norm else 0.0)
        squares.append((lost**2, norm**2))
    lost, norm = (math.sqrt(math.fsum(column)) for column in zip(*squares, strict=True))
    return Resized(
        replace(lora, updates=updates),
        changes,
        lost / norm if norm else 0.0,
        nbytes(lora.updates.values()),
        nbytes(updates.values()),
    )


def canonical(update: Update) -> Update:
    """The balanced form ``(U sqrt(S), sqrt(S) V^T)`` in float64; one value at least."""
    up, down = update.factors()
    return Update(down.reshape(-1, *update.shape[1:]), up).truncate()


def cost(update: Update) -> Cost:
    """In numbers, as diffusers stores the update."""
    each = update.shape[0] + math.prod(update.shape[1:])
    return Cost(each, each * update.rank)


def numbers(update: Update) -> int:
    """How many numbers diffusers stores for it: a Tucker core is multiplied into ``down``."""
    return cost(update).whole


def nbytes(updates: Iterable[Update]) -> int:
    """Bytes of the factors as diffusers stores them."""
    return sum(
        u.up.numel() * u.up.element_size() + u.rank * math.prod(u.shape[1:]) * u.down.element_size()
        for u in updates
    )


def difference(one: Update, other: Update) -> float:
    """Frobenius norm of the difference of two updates, without a dense matrix."""
    (up, down), (other_up, other_down) = one.factors(), other.factors()
    return Update(torch.cat([down, other_down]), torch.cat([up, -other_up], 1)).norm()


def _rebuilt(update: Update, old: Tensor, new: Tensor, dtype: torch.dtype) -> Update:
    kept = old[: len(new)]
    # Zero stays zero; a root on both sides keeps them balanced.
    factor = torch.where(kept > 0, new / kept.clamp(min=1e-300), 0.0).sqrt()
    up = update.up[:, : len(new)] * factor
    down = (update.down.flatten(1)[: len(new)] * factor[:, None]).reshape(-1, *update.shape[1:])
    return Update(down.to(dtype), up.to(dtype))
