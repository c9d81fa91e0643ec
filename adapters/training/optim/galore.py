"""GaLore: Adam on gradients projected to their leading singular vectors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from cmlora.adapters.training.optim.lowrank import LowRank, at_most
from cmlora.adapters.training.optim.projector import Projector, Svd


class GaLore(LowRank):
    """``W -= lr * scale * up(Adam(down(G)))`` (arXiv:2403.03507, algorithm 1).

    Every ``gap`` steps the subspace is the leading singular vectors of the present gradient; the
    moments stay as they are. A matrix (O, I) keeps ``2 R max(O, I) + R min(O, I)`` numbers.

    Args:
        params: parameters or groups.
        lr: learning rate.
        rank: of the subspace; below 1 a share of the shorter side.
        gap: steps between two choices of it.
        scale: of the update.
        side: see `cmlora.adapters.training.optim.projector.Svd`.
        options: betas, eps and weight_decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: float = 64,
        gap: int = 200,
        scale: float = 0.25,
        side: str = "std",
        **options: Any,
    ) -> None:
        super().__init__(params, lr, rank=rank, gap=gap, scale=scale, side=side, **options)

    def projector(self, matrix: Tensor, group: dict[str, Any]) -> Projector | None:
        return Svd(at_most(group["rank"], matrix), group["side"])
