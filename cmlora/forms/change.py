"""What a file does to one layer, whatever the form it is stored in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cmlora.lora import Update
from cmlora.lora import full as full

Weight = Callable[[Tensor], Tensor]
"""The weight (O, I) or (O, I, kh, kw) of a layer, in float32, to its delta of the same shape."""

Bias = Callable[[Tensor | None], Tensor]
"""The bias (O,) of a layer, if it has one, to its delta."""


@dataclass(frozen=True, eq=False)
class Parts:
    """The tensors that a file has for one layer.

    Args:
        tensors: by role.
        settings: of the layer's adapter, from the file's header; empty if it says nothing.
        ratio: strength at a rank, alpha / rank in most files.
        alpha: the stored alpha, if there is one.
    """

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    ratio: Callable[[int], float] = lambda rank: 1.0
    alpha: float | None = None

    def __getitem__(self, role: str) -> Tensor:
        """The tensor in at least float32.

        Raises:
            ValueError: if the file does not have it.
        """
        if role not in self.tensors:
            raise ValueError(f"there is no {role} beside {', '.join(sorted(self.tensors))}")
        return full(self.tensors[role])

    def __contains__(self, role: object) -> bool:
        return role in self.tensors

    def get(self, role: str) -> Tensor | None:
        """The tensor in at least float32, or ``None``."""
        return self[role] if role in self.tensors else None


@dataclass(frozen=True, eq=False)
class Change:
    """What a file does to one layer: ``W' = W + update + dense + weight(W)``, ``b' = b + bias(b)``.

    Args:
        update: a low-rank update that is exactly what the file says.
        dense: a known delta of the weight.
        weight: a delta of the weight that follows from the weight, or from its shape.
        bias: delta of the bias.
        base: whether `weight` or `bias` look at the values they are given; otherwise only at the
            shapes.
    """

    update: Update | None = None
    dense: Tensor | None = None
    weight: Weight | None = None
    bias: Bias | None = None
    base: bool = False

    def delta(self, weight: Tensor) -> Tensor | None:
        """The whole delta of a weight, in float32, shaped like it; ``None`` if it stays as it is.

        Raises:
            ValueError: if the shapes do not fit.
        """
        own = full(weight)
        found: list[Tensor] = []
        if self.update is not None:
            found.append(shaped(self.update.delta(), own))
        if self.dense is not None:
            found.append(shaped(self.dense, own))
        if self.weight is not None:
            found.append(shaped(self.weight(own), own))
        return sum(found[1:], found[0]) if found else None


def combined(changes: list[Change]) -> Change:
    """Several independent changes of one layer as one.

    Raises:
        ValueError: if two of them cannot stand side by side.
    """
    if len(changes) == 1:
        return changes[0]
    slots: dict[str, Any] = {}
    for change in changes:
        for slot in ("update", "dense", "weight", "bias"):
            value = getattr(change, slot)
            if value is not None and slot in slots:
                raise ValueError(f"two forms give a {slot} for one layer")
            if value is not None:
                slots[slot] = value
    return Change(**slots, base=any(change.base for change in changes))


def additive(delta: Tensor) -> Change:
    """A known delta of the weight."""
    return Change(dense=delta)


def low_rank(down: Tensor, up: Tensor, scale: float, shape: tuple[int, ...]) -> Change:
    """A product of factors, kept as such where this takes less memory than the matrix.

    Args:
        down: (R, I * kh * kw).
        up: (O, R).
        scale: multiplies the product.
        shape: of the delta.
    """
    rank = len(down)
    if rank * (len(up) + down.shape[1]) < len(up) * down.shape[1]:
        return Change(Update(down.reshape(rank, *shape[1:]), up, scale))
    return additive((up @ down * scale).reshape(shape))


def joined(update: Update | None, matrix: Tensor) -> Tensor:
    """A whole delta, with that of a low-rank update of the same layer if there is one.

    Raises:
        ValueError: if they are of different layers.
    """
    return matrix if update is None else matrix + shaped(update.delta(), matrix)


def shaped(delta: Tensor, weight: Tensor) -> Tensor:
    """The delta in the shape of a weight; some trainers flatten the kernels of convolutions.

    Raises:
        ValueError: if it is a delta of another weight.
    """
    if delta.shape == weight.shape:
        return delta
    if min(delta.ndim, weight.ndim) < 2 or delta.flatten(1).shape != weight.flatten(1).shape:
        raise ValueError(
            f"it is {tuple(delta.shape)} in the file and the layer is {tuple(weight.shape)}"
        )
    return delta.reshape(weight.shape)


def matrix(tensor: Tensor) -> Tensor:
    """A tensor as a matrix: the trailing ones of stored 1x1 convolutions are dropped.

    Raises:
        ValueError: if it is no matrix.
    """
    if tensor.ndim < 2:
        raise ValueError(f"{tuple(tensor.shape)} is no matrix")
    return tensor.flatten(1)
