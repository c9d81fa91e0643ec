"""A LoRA from an update of which only some entries are known, or trusted."""

from __future__ import annotations

from torch import Tensor

from cmlora.adapters.compression.completion import complete
from cmlora.lora import Update


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
