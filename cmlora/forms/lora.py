"""LoRA itself: a product of two factors, with a Tucker core in some convolutions."""

from __future__ import annotations

from dataclasses import replace

from cmlora.forms.change import Change, Parts, additive, full
from cmlora.lora import Update


def lora(parts: Parts) -> Change:
    """``s up down`` with s = alpha / R.

    arXiv:2106.09685; convolutions as in LoCon. ``up`` is stored as (O, R) or (O, R, 1, 1).
    The factors stay in the precision of the file.
    """
    down, up, mid = parts.tensors["down"], parts.tensors["up"], parts.tensors.get("mid")
    if any(size != 1 for size in up.shape[2:]):
        raise ValueError(f"up {tuple(up.shape)} is not (out, rank)")
    up = up.flatten(1) if up.ndim > 2 else up
    scale = parts.ratio(len(down))
    if down.ndim == 5 and mid is None:  # of a video model's patches
        return additive((full(up) @ full(down).flatten(1) * scale).reshape(-1, *down.shape[1:]))
    update = Update(down, up, mid=mid)
    if not all((*update.shape, update.rank)):
        raise ValueError(f"down {tuple(down.shape)} and up {tuple(up.shape)} are empty")
    return Change(replace(update, scale=scale))


def embedding(parts: Parts) -> Change:
    """PEFT's LoRA of an embedding (V, I): ``s (B A)^T`` with A (R, V) and B (I, R)."""
    first, second = parts["embedding_A"], parts["embedding_B"]
    delta = (second @ first).T * parts.ratio(len(first))
    return Change(weight=lambda own: delta)  # a matrix, but of no linear layer
