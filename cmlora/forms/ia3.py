"""(IA)^3: the inputs or the outputs of a layer, rescaled one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora.forms.change import Change, Parts


def ia3(parts: Parts) -> Change:
    """``diag(l) W`` or ``W diag(l)``; LyCORIS stores l - 1 and leaves the bias alone.

    arXiv:2205.05638.
    """
    factor = parts["weight"].flatten()
    on_input = bool(parts["on_input"].flatten()[:1].any())

    def weight(own: Tensor) -> Tensor:
        return own * _along(factor, own, on_input)

    return Change(weight=weight, base=True)


def peft_ia3(parts: Parts) -> Change:
    """PEFT stores l itself, and a scale of the outputs also acts on the bias.

    A linear layer's l is (O, 1) or (1, I). A convolution's is (1, N, 1, 1) for either side; that
    of a layer named as feed-forward is on the inputs.
    """
    stored = parts["ia3_l"]
    if stored.ndim == 2:
        on_input = stored.shape[0] == 1 and stored.shape[1] != 1
    else:
        on_input = bool(parts.settings.get("feedforward"))
    factor = stored.flatten() - 1

    def weight(own: Tensor) -> Tensor:
        return own * _along(factor, own, on_input)

    def bias(own: Tensor | None) -> Tensor:
        return torch.zeros_like(factor) if own is None else own * factor

    return Change(weight=weight, bias=None if on_input else bias, base=True)


def _along(factor: Tensor, own: Tensor, on_input: bool) -> Tensor:
    """The vector (N,) shaped to multiply the inputs or the outputs of a weight."""
    side = 1 if on_input else 0
    if own.ndim <= side or own.shape[side] != len(factor):
        raise ValueError(
            f"{len(factor)} scales for the {'in' if on_input else 'out'}puts of {tuple(own.shape)}"
        )
    return factor.reshape(*[1] * side, -1, *[1] * (own.ndim - side - 1))
