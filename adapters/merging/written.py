"""What goes into a merged file: factors in the files' own precision, and what they agree on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

from cmlora.adapters.merging.factors import Pair, truncate
from cmlora.lora import LoRA, Update

_INHERITED = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "cmlora.base")


def widest(updates: Sequence[Update]) -> torch.dtype:
    """The precision that holds all their factors, at least half; single if there are none."""
    found = [t.dtype for u in updates for t in (u.down, u.up, u.mid) if t is not None]
    # What is computed from numbers of eight bits does not fit into eight bits.
    dtypes = [torch.float16 if dtype.itemsize == 1 else dtype for dtype in found]
    return reduce(torch.promote_types, dtypes, dtypes[0] if dtypes else torch.float32)


def baked(pair: Pair, shape: Sequence[int], dtype: torch.dtype, remarks: dict[str, None]) -> Update:
    """Factors as an update with scale 1.

    Args:
        pair: the factors.
        shape: of the matrix or convolution, as `Update.shape` has it.
        dtype: of the result; single precision if the values are too large for it.
        remarks: where it is said that they are.
    """
    down, up = pair.down.to(dtype), pair.up.to(dtype)
    if not (down.isfinite().all() and up.isfinite().all()):
        remarks[f"merged in float32: values are too large for {dtype}"] = None
        pair = truncate(pair)
        down, up = pair.down.float(), pair.up.float()
    return Update(down.reshape(pair.rank, *shape[1:]).contiguous(), up.contiguous())


def inherited(loras: Sequence[LoRA]) -> dict[str, str]:
    """What all files agree on about the model they are for."""
    found = {}
    for key in _INHERITED:
        said = {lora.metadata.get(key) for lora in loras}
        value = said.pop()
        if value is not None and not said:
            found[key] = value
    return found
