"""Trained rank pruning: a model that is kept near low rank while it trains, and factors for free.

After arXiv:1812.02402. Call `prune` every few steps between the backward pass and the optimizer's
step; when the training is over, the method `trp` keeps the rank that is left and loses next to
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cmlora.adapters.compression.energy import least as least_rank
from cmlora.adapters.compression.form import Factors, check_keep
from cmlora.adapters.compression.heal import Call
from cmlora.adapters.compression.layers import fits
from cmlora.adapters.compression.svd import svd
from cmlora.errors import CmloraError

SHAPES = ("nc", "vh", "nd")


def trp(
    matrix: Tensor, keep: float, gram: Tensor | None = None, least: float = 5e-2
) -> Factors | None:
    """What pruning leaves: as many factors as there are singular values of ``least`` or more.

    Args:
        matrix: W (O, I).
        keep: share of the bytes, which the rank never exceeds.
        gram: see `cmlora.adapters.compression.form.root`; the factors are those of `svd` with it.
        least: of a singular value of W that counts.
    """
    check_keep(keep)
    outputs, inputs = matrix.shape
    rank = int((torch.linalg.svdvals(matrix.double()) >= least).sum())
    # Half a rank more than is meant, so that rounding takes none away.
    share = (max(rank, 1) + 0.5) * (outputs + inputs) / (outputs * inputs)
    return svd(matrix, min(keep, share), gram)


def prune(
    model: nn.Module, energy: float = 0.9, weight: float = 3e-4, shape: str = "nc"
) -> dict[str, int]:
    """Cut every layer to the rank that holds the energy, and pull the rest of it down.

    Each matrix W = U S V^T becomes its first k terms, and ``weight * U_k V_k^T``, a subgradient of
    the nuclear norm, is added to its gradient. 1x1 convolutions and layers without a gradient stay
    as they are.

    Args:
        model: in training; changed in place.
        energy: share of each matrix's squared norm that is kept.
        weight: of the nuclear norm in the loss.
        shape: how a kernel is read as a matrix: "nc" (O, I kh kw), which all compact forms are of;
            "vh" (I kh, O kw), for one direction after the other; "nd" (I, kh kw) for each output.

    Returns:
        The ranks left, by module name; for "nd" the largest.

    Raises:
        CmloraError: if the share of energy is not above 0 and at most 1, or the shape is unknown.
    """
    if shape not in SHAPES:
        raise CmloraError(f"pruning reads kernels as {', '.join(SHAPES)}, not {shape!r}")
    if not 0 < energy <= 1:
        raise CmloraError(f"pruning keeps a share of energy above 0 and up to 1, not {energy:g}")
    ranks = {}
    for name, layer in model.named_modules():
        parameter = getattr(layer, "weight", None)
        if not fits(layer) or parameter is None or parameter.grad is None:
            continue
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            continue
        low, direction, ranks[name] = pruned(_seen(parameter.detach(), shape), energy)
        with torch.no_grad():
            parameter.copy_(_back(low, parameter.shape, shape))
            slope = _back(direction, parameter.shape, shape).to(parameter)
            parameter.grad.add_(slope, alpha=weight)
    return ranks


def _seen(weight: Tensor, shape: str) -> Tensor:
    """A layer's weight as the matrix, or matrices, that are pruned."""
    if weight.ndim == 2 or shape == "nc":
        return weight.flatten(1)
    if shape == "nd":
        return weight.flatten(2)
    return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


def _back(matrix: Tensor, size: torch.Size, shape: str) -> Tensor:
    """The weight of a size that `_seen` made this of."""
    if len(size) == 2 or shape != "vh":
        return matrix.reshape(size)
    outputs, inputs, height, width = size
    return matrix.reshape(inputs, height, outputs, width).permute(2, 0, 1, 3)


def pruned(matrix: Tensor, energy: float) -> tuple[Tensor, Tensor, int]:
    """The first k terms of (..., O, I), the slope of their nuclear norm ``U_k V_k^T``, and k."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    ranks = torch.tensor([least_rank(row, energy) for row in s.reshape(-1, s.shape[-1])])
    kept = torch.arange(s.shape[-1]) < ranks.reshape(*s.shape[:-1], 1)
    u = u * kept.to(u)[..., None, :]
    return (u * s[..., None, :]) @ vh, u @ vh, int(ranks.max())


def steer(
    model: nn.Module,
    original: nn.Module,
    calls: Sequence[Call],
    steps: int = 100,
    rate: float = 1e-4,
    energy: float = 0.95,
    weight: float = 3e-4,
    every: int = 5,
    shape: str = "nc",
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
        shape: see `prune`.

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
            if step % every == every - 1 or step == steps - 1:
                prune(model, energy, weight, shape)
            optimizer.step()
            schedule.step()
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
            parameter.grad = None
    return tuple(losses)
