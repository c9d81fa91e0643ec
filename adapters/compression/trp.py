"""Trained rank pruning: a model that is kept near low rank while it trains, and factors for free.

After arXiv:1812.02402. Call `prune` every few steps between the backward pass and the optimizer's
step; when the training is over, `svd` at the rank that is left loses next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cmlora.adapters.compression.energy import least
from cmlora.adapters.compression.heal import Call
from cmlora.adapters.compression.layers import fits, matrix_of
from cmlora.errors import CmloraError


def prune(model: nn.Module, energy: float = 0.9, weight: float = 3e-4) -> dict[str, int]:
    """Cut every layer to the rank that holds the energy, and pull the rest of it down.

    Each matrix W = U S V^T becomes its first k terms, and ``weight * U_k V_k^T``, a subgradient of
    the nuclear norm, is added to its gradient. 1x1 convolutions and layers without a gradient stay
    as they are.

    Args:
        model: in training; changed in place.
        energy: share of each matrix's squared norm that is kept.
        weight: of the nuclear norm in the loss.

    Returns:
        The ranks left, by module name.

    Raises:
        CmloraError: if the share of energy is not above 0 and at most 1.
    """
    if not 0 < energy <= 1:
        raise CmloraError(f"pruning keeps a share of energy above 0 and up to 1, not {energy:g}")
    ranks = {}
    for name, layer in model.named_modules():
        parameter = getattr(layer, "weight", None)
        if not fits(layer) or parameter is None or parameter.grad is None:
            continue
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            continue
        low, direction, ranks[name] = pruned(matrix_of(layer), energy)
        with torch.no_grad():
            parameter.copy_(low.reshape(parameter.shape))
            parameter.grad.add_(direction.reshape(parameter.shape).to(parameter), alpha=weight)
    return ranks


def pruned(matrix: Tensor, energy: float) -> tuple[Tensor, Tensor, int]:
    """The first k terms of (O, I), the slope of their nuclear norm ``U_k V_k^T``, and k."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    rank = least(s, energy)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    return (u * s) @ vh, u @ vh, rank


def steer(
    model: nn.Module,
    original: nn.Module,
    calls: Sequence[Call],
    steps: int = 100,
    rate: float = 1e-4,
    energy: float = 0.95,
    weight: float = 3e-4,
    every: int = 5,
) -> tuple[float, ...]:
    """Distil a model into a copy of itself that is kept near low rank, before it is factored.

    Args:
        model: a copy of the original; changed in place.
        original: what it should answer like.
        calls: taken in turn.
        steps: of Adam, with the rate falling to zero along a cosine; the last one prunes.
        rate: where it starts.
        energy: see `prune`.
        weight: see `prune`.
        every: steps between two prunings.

    Returns:
        The relative error before each step.

    Raises:
        CmloraError: if there is no call or no layer to prune.
    """
    layers = [layer for layer in model.modules() if fits(layer)]
    trained = [p for layer in layers for p in layer.parameters(recurse=False)]
    if not calls or not trained:
        raise CmloraError("pruning needs calls of the model, and layers to prune")
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    losses = []
    try:
        for step in range(steps):
            call = calls[step % len(calls)]
            with torch.no_grad():
                wanted = call(original)
            size = wanted.square().mean().clamp(min=1e-12)
            loss = functional.mse_loss(call(model), wanted) / size
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            if step % every == every - 1:
                prune(model, energy, weight)
            optimizer.step()
            schedule.step()
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
            parameter.grad = None
    return tuple(losses)
