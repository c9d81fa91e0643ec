"""LoRA-Pro: steps of both factors that together are as close to full training as they can be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cmlora.adapters.training.optim.lowrank import direction
from cmlora.adapters.training.optim.projector import flat
from cmlora.errors import CmloraError

DAMPING = 1e-8


class LoraPro(Optimizer):
    """AdamW on the factors' gradients after `adjusted` (arXiv:2407.18242, theorems 2.1 and 2.2).

    Args:
        params: groups of exactly two parameters, down (R, I) and up (O, R) or their convolutions,
            with the update's strength as ``strength``.
        lr: learning rate.
        betas: of Adam.
        eps: of Adam.
        weight_decay: decoupled, on the factors.
        moments: "factor" keeps those of the adjusted gradients, ``2 R (O + I)`` numbers; "full"
            those of the equivalent gradient, ``2 O I``, as the published code does.
    """

    paired = True
    """Groups are pairs of factors."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments: str = "factor",
    ) -> None:
        if moments not in ("factor", "full"):
            raise CmloraError(f"lora_pro: moments is {moments!r}, not factor or full")
        own = {"betas": (float(betas[0]), float(betas[1])), "eps": eps, "strength": 1.0}
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "moments": moments, **own}
        )
        for group in self.param_groups:
            if len(group["params"]) != 2:
                raise CmloraError("lora_pro trains pairs of factors, down and up")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns the loss if a closure computes it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if all(parameter.grad is not None for parameter in group["params"]):
                self._pair(group)
        return loss

    def _pair(self, group: dict[str, Any]) -> None:
        down, up = group["params"]
        a, b, scale = flat(down).float(), flat(up).float(), float(group["strength"])
        first, second = adjusted(a, b, flat(down.grad).float(), flat(up.grad).float(), scale)
        if group["moments"] == "full":
            whole = scale * (b @ first + second @ a)
            whole = direction(whole, self.state[down], group)
            steps = adjusted(a, b, scale * b.T @ whole, scale * whole @ a.T, scale)
        else:
            steps = (
                direction(first, self.state[down], group),
                direction(second, self.state[up], group),
            )
        for parameter, step in zip((down, up), steps, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(step.reshape(parameter.shape).to(parameter), alpha=-group["lr"])


def adjusted(
    down: Tensor, up: Tensor, down_gradient: Tensor, up_gradient: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The steps of both factors whose common effect is the gradient's projection.

    ``s (B h_A + h_B A) = G - (I - P_B) G (I - P_A)``, the part of the full gradient that changes
    of the factors can reach; among all pairs with that effect the one closest to the gradients
    themselves.

    Args:
        down: A (R, I).
        up: B (O, R).
        down_gradient: ``s B^T G``.
        up_gradient: ``s G A^T``.
        scale: s.

    Returns:
        ``h_A`` (R, I) and ``h_B`` (O, R).
    """
    a, b = down.double(), up.double()
    ga, gb = down_gradient.double(), up_gradient.double()
    square = scale**-2
    values_a, vectors_a = _gram(a @ a.T)
    inverse_a = (vectors_a / values_a) @ vectors_a.T
    if not bool(b.any()):
        return down_gradient, (square * gb @ inverse_a).to(up)
    values_b, vectors_b = _gram(b.T @ b)
    inverse_b = (vectors_b / values_b) @ vectors_b.T
    wanted = -square * inverse_b @ ga @ a.T
    inner = vectors_b.T @ wanted @ vectors_a
    free = vectors_b @ (inner / (values_b[:, None] + values_a[None])) @ vectors_a.T
    first = square * inverse_b @ ga + free @ a
    outside = gb - b @ (inverse_b @ (b.T @ gb))
    second = square * outside @ inverse_a - b @ free
    return first.to(down), second.to(up)


def _gram(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of a damped Gram matrix."""
    size = len(matrix)
    mean = matrix.diagonal().mean().clamp(min=1e-300)
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    values, vectors = torch.linalg.eigh(matrix + DAMPING * mean * eye)
    return values.clamp(min=DAMPING * float(mean)), vectors
