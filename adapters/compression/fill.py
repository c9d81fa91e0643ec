"""A LoRA from updates of which only some entries are known, or trusted."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from cmlora.adapters.compression.completion import complete
from cmlora.adapters.compression.resize import Change, Resized, nbytes
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update

_HIDDEN = 0.05
"""Share of the known entries by which a rank is chosen."""
_LARGEST = 64


def fill(delta: Tensor, known: Tensor, rank: int, sweeps: int = 20) -> Update:
    """The update of a rank that agrees with the known entries; the others are not taken for zero.

    Merging methods that drop entries leave zeros which truncation would then fit; here what was
    dropped is free.

    Args:
        delta: (O, I) or (O, I, kh, kw).
        known: the same shape, true where the entry counts.
        rank: of the result.
        sweeps: see `complete`.

    Raises:
        CmloraError: if nothing is known, or the rank is not from 1 to the smaller side.
    """
    u, v = complete(delta.flatten(1), known.flatten(1), rank, sweeps)
    down = v.T.reshape(rank, *delta.shape[1:])
    balanced = Update(down, u).truncate(rank)
    dtype = delta.dtype
    return Update(balanced.down.to(dtype), balanced.up.to(dtype), balanced.scale)


def best_rank(delta: Tensor, known: Tensor, sweeps: int = 20, seed: int = 0) -> int:
    """The rank, a power of two up to 64, that foretells hidden ones of the known entries best.

    Ranks with more numbers than there are known entries are left out.

    Args:
        delta: (O, I) or (O, I, kh, kw).
        known: the same shape.
        sweeps: see `complete`.
        seed: of which are hidden.
    """
    matrix, mask = delta.flatten(1), known.flatten(1)
    generator = torch.Generator().manual_seed(seed)
    hidden = mask & (torch.rand(mask.shape, generator=generator) < _HIDDEN)
    shown = mask & ~hidden
    best, least = 1, math.inf
    rank = 1
    while rank <= ceiling(matrix, shown) and rank <= _LARGEST and bool(hidden.any()):
        u, v = complete(matrix, shown, rank, sweeps)
        lost = float(((u @ v.T - matrix.double()) * hidden).norm())
        if lost < least:
            best, least = rank, lost
        elif rank > 2 * best:
            break
        rank *= 2
    return best


def ceiling(matrix: Tensor, known: Tensor) -> int:
    """The largest rank with no more numbers than there are known entries; 1 at least."""
    outputs, inputs = matrix.shape
    count = int(known.sum())
    fits = (k for k in range(1, min(matrix.shape) + 1) if k * (outputs + inputs - k) <= count)
    return max(fits, default=1)


def fill_all(lora: LoRA, rank: int | None = None, sweeps: int = 20) -> Resized:
    """A LoRA whose entries of zero are taken for unknown, as masks leave them, at a low rank.

    Updates without an entry of zero, or with nothing else, stay as they are.

    Args:
        lora: of whole matrices, most likely.
        rank: of every update that is filled; found by `best_rank` for each if not given.
        sweeps: see `complete`.

    Returns:
        The errors are those of the known entries.

    Raises:
        CmloraError: if no update has entries of zero, or the known ones are too few for the rank.
    """
    holes = {}
    for module, update in lora.updates.items():
        delta = update.delta()
        known = delta != 0
        if bool(known.any()) and not bool(known.all()):
            holes[module] = delta, known
    if not holes:
        raise CmloraError(f"{lora.name} has no updates with entries of zero to fill")
    most = max(ceiling(d.flatten(1), k.flatten(1)) for d, k in holes.values())
    if rank is not None and not 1 <= rank <= most:
        raise CmloraError(f"rank {rank} is not possible; the known entries allow 1 to {most}")
    updates, changes = dict(lora.updates), {}
    squares = [(0.0, update.norm() ** 2) for m, update in lora.updates.items() if m not in holes]
    for module, (delta, known) in holes.items():
        own = ceiling(delta.flatten(1), known.flatten(1))
        wanted = best_rank(delta, known, sweeps) if rank is None else min(rank, own)
        updates[module] = fill(delta, known, wanted, sweeps)
        lost = float(((updates[module].delta() - delta) * known).double().norm())
        norm = float(delta.double().norm())
        changes[module] = Change(lora.updates[module].rank, wanted, lost / norm)
        squares.append((lost**2, norm**2))
    lost, norm = (math.sqrt(math.fsum(column)) for column in zip(*squares, strict=True))
    before, after = nbytes(lora.updates.values()), nbytes(updates.values())
    return Resized(replace(lora, updates=updates), changes, lost / norm, before, after)
