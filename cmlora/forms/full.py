"""Differences of whole tensors, as they are."""

from __future__ import annotations

from cmlora.forms.change import Change, Parts


def full(parts: Parts) -> Change:
    """``W' = W + diff``, ``b' = b + diff_b``."""
    return _shift(parts, "diff", "diff_b")


def norm(parts: Parts) -> Change:
    """The same for a normalisation layer: its weight plus ``w_norm``, its bias plus ``b_norm``."""
    return _shift(parts, "w_norm", "b_norm")


def values(parts: Parts) -> Change:
    """A tensor that takes the place of the layer's own, as in BFL's control LoRAs."""
    weight = parts["value"]
    return Change(weight=lambda own: weight.reshape(own.shape) - own, base=True)


def lora_bias(parts: Parts) -> Change:
    """The bias of a LoRA's up factor: an addition to the layer's bias, scaled like the update.

    PEFT calls the option ``lora_bias``.
    """
    shift = parts["up_bias"]
    scale = parts.ratio(parts["down"].shape[0]) if "down" in parts else 1.0
    return Change(bias=lambda own: shift * scale)


def _shift(parts: Parts, weight: str, bias: str) -> Change:
    first, second = parts.get(weight), parts.get(bias)
    if second is not None and not bool(second.any()):
        second = None  # trainers write zeros for what they did not train
    return Change(dense=first, bias=None if second is None else lambda own: second)
