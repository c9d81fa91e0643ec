"""Adam in a subspace of fixed cosines: only which of them is chosen, and no SVD is needed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cmlora.adapters.training.optim.lowrank import LowRank, at_most
from cmlora.adapters.training.optim.projector import Projector, one_side
from cmlora.errors import CmloraError


class Dct(LowRank):
    """AdamW on the R most active of the cosine components of each gradient (arXiv:2505.17967).

    A matrix (O, I) is transformed along its shorter side; the components with the largest norm
    are kept. All that is stored besides the moments is their numbers, ``2 R max(O, I) + R`` in
    all. When components change, moments of those that stay are carried over.

    Args:
        params: parameters or groups.
        lr: learning rate.
        rank: components; below 1 a share of the shorter side.
        gap: steps between two choices of them.
        scale: of the update.
        norm: by which they are chosen, 1 or 2; with 2 the residual is never more than
            ``(1 - R / n)`` of the gradient's energy.
        feedback: add what was left out to the next gradient; costs O x I numbers.
        rotate: carry moments over; otherwise they stay where they are, whatever they stand for.
        options: betas, eps and weight_decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: float = 64,
        gap: int = 1,
        scale: float = 1.0,
        norm: int = 1,
        feedback: bool = False,
        rotate: bool = True,
        **options: Any,
    ) -> None:
        if norm not in (1, 2):
            raise CmloraError(f"dct: norm is {norm}, not 1 or 2")
        own: dict[str, Any] = {"rank": rank, "gap": gap, "scale": scale, "norm": norm}
        super().__init__(params, lr, feedback=feedback, rotate=rotate, **own, **options)

    def projector(self, matrix: Tensor, group: dict[str, Any]) -> Projector | None:
        return Cosines(at_most(group["rank"], matrix), group["norm"])

    def moved(self, old: dict[str, Any], state: dict[str, Any], group: dict[str, Any]) -> None:
        if not group["rotate"] or "first" not in state:
            return
        # Between two sets of the same orthonormal cosines the rotation is a selection.
        same = state["space"]["chosen"][:, None] == old["chosen"][None]
        rotation = same.to(state["first"])
        right = state["space"]["right"]
        for key in ("first", "second"):
            state[key] = state[key] @ rotation.T if right else rotation @ state[key]

    def _projected(
        self,
        matrix: Tensor,
        projector: Projector,
        state: dict[str, Any],
        group: dict[str, Any],
        number: int,
    ) -> Tensor:
        if group["feedback"]:
            matrix = matrix + state.get("error", 0.0)
        return super()._projected(matrix, projector, state, group, number)

    def rest(
        self, gradient: Tensor, inside: Tensor, update: Tensor, state: dict[str, Any], group: Any
    ) -> Tensor:
        if group["feedback"]:
            state["error"] = gradient - inside
        return torch.zeros_like(gradient)


class Cosines:
    """The cosine components with the largest norm.

    Args:
        rank: how many.
        norm: 1 or 2.
    """

    def __init__(self, rank: int, norm: int = 1) -> None:
        self.rank, self.norm = rank, norm

    def fit(self, gradient: Tensor, state: dict[str, Any], seed: int) -> None:
        right = one_side("std", *gradient.shape) == "right"
        spectrum = transformed(gradient if right else gradient.T)  # (long, short)
        size = spectrum.abs().sum(0) if self.norm == 1 else spectrum.square().sum(0)
        best = size.argsort(descending=True, stable=True)[: self.rank]
        state["right"], state["chosen"] = right, best.sort().values

    def down(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        rows = self._rows(gradient, state)
        return gradient @ rows.T if state["right"] else rows @ gradient

    def up(self, small: Tensor, state: dict[str, Any], shape: torch.Size) -> Tensor:
        side = shape[1] if state["right"] else shape[0]
        rows = cosines(side, small.device, small.dtype)[state["chosen"]]
        return small @ rows if state["right"] else rows.T @ small

    def _rows(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        side = gradient.shape[1 if state["right"] else 0]
        return cosines(side, gradient.device, gradient.dtype)[state["chosen"]]


@lru_cache(maxsize=32)
def cosines(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The orthonormal DCT-II matrix (n, n): row i is ``sqrt(2 / n) cos(i (2 j + 1) pi / (2 n))``.

    Row 0 is divided by the square root of 2. One matrix is shared by all layers of a size.
    """
    i = torch.arange(size, dtype=torch.double)
    matrix = torch.cos(i[:, None] * (2 * i[None] + 1) * (math.pi / (2 * size)))
    matrix *= math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.to(device, dtype)


def transformed(rows: Tensor) -> Tensor:
    """``rows @ cosines(n).T`` of (..., n) by one FFT (Makhoul 1980): even places, then odd ones
    backwards."""
    n = rows.shape[-1]
    mixed = torch.cat([rows[..., ::2], rows[..., 1::2].flip(-1)], -1)
    spectrum = torch.fft.fft(mixed.double())
    angle = torch.arange(n, dtype=torch.double, device=rows.device) * (-math.pi / (2 * n))
    found: Tensor = (spectrum * torch.polar(torch.ones_like(angle), angle)).real * math.sqrt(2 / n)
    found[..., 0] /= math.sqrt(2)
    return found.to(rows.dtype)
