"""Subspaces that gradients are projected to: how the low-rank optimizers differ.

A projector is fitted to a gradient (O, I), takes gradients down to the subspace and updates up
again. Its state is tensors and numbers only, so that it can be saved.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from cmlora.errors import CmloraError

SIDES = ("std", "reverse_std", "left", "right", "full")


class Projector(Protocol):
    """What an optimizer needs of a subspace; ``state`` is the table it is kept in."""

    def fit(self, gradient: Tensor, state: dict[str, Any], seed: int) -> None:
        """Chooses the subspace by a gradient (O, I)."""

    def down(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        """The gradient in the subspace."""

    def up(self, small: Tensor, state: dict[str, Any], shape: torch.Size) -> Tensor:
        """What the subspace holds as a whole matrix (O, I)."""


class Svd:
    """The leading singular vectors of the gradient.

    Args:
        rank: of the subspace; the shorter side at most.
        side: "right" multiplies from the right, G P^T (O, R); "left" P^T G (R, I); "std" takes the
            one that leaves the longer side, "reverse_std" the other; "full" both, (R, R).
    """

    def __init__(self, rank: int, side: str = "std") -> None:
        if side not in SIDES:
            raise CmloraError(f"projection side is {side!r}, not one of {', '.join(SIDES)}")
        self.rank, self.side = rank, side

    def fit(self, gradient: Tensor, state: dict[str, Any], seed: int) -> None:
        u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
        self.keep(u[:, : self.rank], vh[: self.rank], state)

    def keep(self, left: Tensor, right: Tensor, state: dict[str, Any]) -> None:
        """Sets the subspace: orthonormal (O, R) and (R, I), of which the side in use is kept."""
        side = one_side(self.side, len(left), right.shape[1])
        if side != "right":
            state["left"] = left.contiguous().clone()
        if side != "left":
            state["right"] = right.contiguous().clone()

    def down(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        small = gradient
        if "left" in state:
            small = state["left"].T @ small
        return small @ state["right"].T if "right" in state else small

    def up(self, small: Tensor, state: dict[str, Any], shape: torch.Size) -> Tensor:
        whole = state["left"] @ small if "left" in state else small
        return whole @ state["right"] if "right" in state else whole


class Random(Svd):
    """Orthonormal directions drawn at random."""

    def fit(self, gradient: Tensor, state: dict[str, Any], seed: int) -> None:
        outputs, inputs = gradient.shape
        random = torch.Generator().manual_seed(seed)
        rank = min(self.rank, outputs, inputs)
        left = torch.linalg.qr(torch.randn(outputs, rank, generator=random))[0]
        right = torch.linalg.qr(torch.randn(inputs, rank, generator=random))[0].T
        self.keep(left.to(gradient.device), right.to(gradient.device), state)


class Select:
    """Some columns, rows or single entries, drawn at random.

    Args:
        share: of them.
        what: "columns", "rows" or "entries".
    """

    def __init__(self, share: float, what: str = "columns") -> None:
        if what not in ("columns", "rows", "entries"):
            raise CmloraError(f"a projection selects columns, rows or entries, not {what!r}")
        self.share, self.what = share, what

    def fit(self, gradient: Tensor, state: dict[str, Any], seed: int) -> None:
        size = {"columns": gradient.shape[1], "rows": gradient.shape[0]}.get(
            self.what, gradient.numel()
        )
        random = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(size, generator=random)[: round(self.share * size)]
        state["chosen"] = chosen.sort().values.to(gradient.device)

    def down(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        if self.what == "entries":
            return gradient.flatten()[state["chosen"]]
        return gradient.index_select(1 if self.what == "columns" else 0, state["chosen"])

    def up(self, small: Tensor, state: dict[str, Any], shape: torch.Size) -> Tensor:
        whole = small.new_zeros(shape)
        if self.what == "entries":
            return whole.flatten().index_copy(0, state["chosen"], small).reshape(shape)
        return whole.index_copy(1 if self.what == "columns" else 0, state["chosen"], small)


def one_side(side: str, outputs: int, inputs: int) -> str:
    """Which side of an (O, I) matrix is projected: "left", "right" or "full"."""
    if side in ("std", "reverse_std"):
        return "right" if (outputs >= inputs) == (side == "std") else "left"
    return side


def flat(tensor: Tensor) -> Tensor:
    """A tensor of two or more dimensions as (O, I)."""
    return tensor.flatten(1)
