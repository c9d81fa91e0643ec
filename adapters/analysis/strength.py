"""How strong a LoRA may be before a layer's outputs leave the range the base model has.

The norms decide whether attention can be computed or approximated fast at all (arXiv:2406.03136,
which bounds them by a constant times ``sqrt(log L)``); in practice outputs far outside the base
model's range show as burnt pictures. Nothing here promises a speed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cmlora.errors import CmloraError
from cmlora.lora import Update

ROOM = 1.5
"""How far beyond its own range the base model is allowed to be pushed."""


class Bound(NamedTuple):
    """Where a layer stands.

    Args:
        base: largest entry of ``X W^T`` in size.
        added: the same of ``X D^T`` at strength 1.
        ratio: ``base / sqrt(ln L)`` for L tokens.
        safest: the largest strength with ``max |X (W + a D)^T| <= ROOM * base``; infinite if the
            update does nothing to these inputs.
    """

    base: float
    added: float
    ratio: float
    safest: float


def bound(inputs: Tensor, matrix: Tensor, update: Update, room: float = ROOM) -> Bound:
    """Measure one layer on typical inputs.

    Each output is a straight line in the strength, so that the largest safe one is where the
    first of them reaches the limit.

    Args:
        inputs: X (L, I), the tokens of one picture.
        matrix: W (O, I).
        update: of this layer.
        room: the limit in units of the base's largest output.

    Raises:
        CmloraError: if the shapes do not fit, or there is a single token.
    """
    if inputs.ndim != 2 or inputs.shape[1] != matrix.shape[1]:
        shapes = f"inputs {tuple(inputs.shape)}, a layer {tuple(matrix.shape)}"
        raise CmloraError(f"{shapes}: the one does not fit the other")
    return bound_of(inputs, inputs.double() @ matrix.double().T, update, room)


def bound_of(inputs: Tensor, outputs: Tensor, update: Update, room: float = ROOM) -> Bound:
    """The same from what the layer made of the inputs, without its matrix.

    Args:
        inputs: X (L, I), the tokens of one picture.
        outputs: of the base model, (L, O).
        update: of this layer.
        room: the limit in units of the base's largest output.

    Raises:
        CmloraError: if the shapes do not fit, or there is a single token.
    """
    up, down = update.factors()
    if inputs.ndim != 2 or len(inputs) < 2:
        raise CmloraError(f"inputs {tuple(inputs.shape)} are not two tokens or more")
    if inputs.shape[1] != down.shape[1] or outputs.shape != (len(inputs), len(up)):
        raise CmloraError(
            f"an update {update.shape} does not fit a layer from {inputs.shape[1]} to "
            f"{outputs.shape[-1]}"
        )
    x, plain = inputs.double(), outputs.double()
    added = (x @ down.T) @ up.T
    base = float(plain.abs().max())
    limit = room * base
    reach = (limit - plain * added.sign()) / added.abs()
    moved = reach[added != 0]
    return Bound(
        base,
        float(added.abs().max()),
        base / math.sqrt(math.log(len(x))),
        float(moved.min()) if moved.numel() else math.inf,
    )


def attention_rank(queries: Tensor, keys: Tensor, epsilon: float = 1e-3) -> int:
    """How many singular values of ``exp(Q K^T / sqrt(d))`` exceed epsilon times the first.

    Rows are scaled to a maximum of 1, which softmax does not notice.

    Args:
        queries: Q (L, d), of one head.
        keys: K (L, d).
        epsilon: what counts as zero.
    """
    logits = queries.double() @ keys.double().T / math.sqrt(queries.shape[1])
    values = torch.linalg.svdvals(torch.exp(logits - logits.max(1, keepdim=True).values))
    return int((values > epsilon * values[0]).sum())
