"""DoRA: the lengths of the weight's rows or columns are stored beside an update."""

from __future__ import annotations

import torch
from torch import Tensor

from cmlora.forms.change import Change, Parts, full


def dora(change: Change, parts: Parts) -> Change:
    """``g * (W + delta) / |W + delta| - W``, lengths taken per output, or per input.

    arXiv:2402.09353. ``dora_scale`` of kohya and LyCORIS is (O, 1[, 1, 1]) per output and
    (1, I[, 1, 1]) per input; PEFT's ``lora_magnitude_vector`` is per output, (O,) or (1, O, 1, 1).

    Args:
        change: what the delta is; any form may be decomposed.
        parts: the layer's tensors.
    """
    stored = parts.get("dora_scale")
    if stored is None:
        lengths, per_output = parts["magnitude"].flatten(), True
    else:
        per_output = stored.ndim < 2 or stored.shape[0] != 1 or stored.shape[1] == 1
        lengths = stored.flatten()
    if not bool((lengths != 0).any()):
        raise ValueError("all lengths of dora_scale are zero")

    def weight(own: Tensor) -> Tensor:
        delta = change.delta(own)
        sum_ = own if delta is None else own + delta
        rows = sum_ if per_output else sum_.transpose(0, 1)
        if len(rows) != len(lengths):
            raise ValueError(f"{len(lengths)} lengths for a layer of {tuple(own.shape)}")
        norms = rows.flatten(1).norm(dim=1)
        ratio: Tensor = lengths / (norms + torch.finfo(torch.float32).eps)
        shape = [1] * own.ndim
        shape[0 if per_output else 1] = -1
        return full(sum_) * ratio.reshape(shape) - own

    return Change(weight=weight, bias=change.bias, base=True)
