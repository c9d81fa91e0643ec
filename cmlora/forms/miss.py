"""MiSS, once called Bone: one small matrix is repeated over shards of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora.forms.change import Change, Parts


def miss(parts: Parts) -> Change:
    """Column j of the update is row ``j mod R`` of D (R, O); in "bat", block a, b is (W + 1) D_a.

    arXiv:2409.15371. D may have fewer columns than there are outputs ("mini"), and is then
    repeated over them too. Three-dimensional D (O / R, R, R) is "bat", which looks at the weight.
    """
    shard = parts["miss_block"]
    if shard.ndim == 3:
        return Change(weight=lambda own: _blocks(shard, own), base=True)
    if shard.ndim != 2:
        raise ValueError(f"miss_block is {tuple(shard.shape)}")

    def weight(own: Tensor) -> Tensor:
        outputs, inputs = own.shape[0], own[0].numel()
        if outputs % shard.shape[1]:
            raise ValueError(f"miss_block is {tuple(shard.shape)}, the layer {tuple(own.shape)}")
        rows = shard[torch.arange(inputs) % len(shard)]
        return rows.T.repeat(outputs // shard.shape[1], 1).reshape(own.shape)

    return Change(weight=weight)


def _blocks(shard: Tensor, own: Tensor) -> Tensor:
    matrix, size = own.flatten(1), shard.shape[-1]
    outputs, inputs = matrix.shape
    if outputs != len(shard) * size or inputs % size:
        raise ValueError(f"miss_block is {tuple(shard.shape)}, the layer {tuple(own.shape)}")
    blocks = matrix.reshape(-1, size, inputs // size, size)
    one = torch.eye(size, dtype=own.dtype)[:, None]
    return torch.einsum("aibj,ajk->aibk", blocks + one, shard).reshape(own.shape)
