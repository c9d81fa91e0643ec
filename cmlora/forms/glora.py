"""GLoRA: a low-rank update plus a low-rank change of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora.forms.change import Change, Parts, matrix
from cmlora.lora import Update


def glora(parts: Parts) -> Change:
    """``s (B1 B2 + W A1 A2)`` with s = alpha / R.

    arXiv:2306.07967, in the form of LyCORIS: A2 (R, I) goes down and A1 (I, R) up. For a
    convolution A acts on the channels alone, and B may have a Tucker core ``bm``.
    """
    first, second = matrix(parts["a1"]), matrix(parts["a2"])
    scale = parts.ratio(len(second))
    update = Update(parts["b2"], matrix(parts["b1"]), scale, mid=parts.get("bm"))

    def weight(own: Tensor) -> Tensor:
        if own.shape[1] != len(first):
            raise ValueError(f"a1 is {tuple(first.shape)} and the layer {tuple(own.shape)}")
        return torch.einsum("oi...,ij->oj...", own, first @ second) * scale

    return Change(update, weight=weight, base=True)
