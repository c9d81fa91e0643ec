"""Training the compact layers of a model to answer as the original did; no pictures are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cmlora.adapters.compression.form import dense
from cmlora.adapters.compression.layers import CompactConv2d, CompactLinear, matrix_of
from cmlora.errors import CmloraError

Call = Callable[[nn.Module], Tensor]
"""Runs a model on some inputs and returns its output, for example ``lambda m: m(x, t, text)``."""


def heal(
    model: nn.Module,
    original: nn.Module,
    calls: Sequence[Call],
    steps: int = 200,
    rate: float = 1e-4,
    features: Sequence[str] = (),
    weight: float = 1.0,
    excess: float = 0.0,
    slack: float = 1e-3,
) -> tuple[float, ...]:
    """Distil the original into the factors of the compact layers, after PELA (arXiv:2310.10700).

    The loss of a call is the mean squared difference of the outputs plus ``weight`` times its mean
    over the outputs of the modules in ``features``, each relative to the original's mean square,
    plus ``excess`` times the mean over the layers of ``(max |W' - W| - slack)^2``, for the compact
    matrix W' and the original's W. Only the tensors of compact layers change.

    Args:
        model: compressed; changed in place.
        original: what it should answer like, left alone.
        calls: taken in turn.
        steps: of Adam, with the rate falling to zero along a cosine.
        rate: where it starts.
        features: names of modules that both models have, for example what `blocks` finds.
        weight: of the features.
        excess: weight of the largest change of an entry in each layer; the matrices are formed at
            every step then.
        slack: how much an entry may change.

    Returns:
        The loss before each step.

    Raises:
        CmloraError: if there is no call or nothing to train.
    """
    every = [
        (n, m) for n, m in model.named_modules() if isinstance(m, CompactLinear | CompactConv2d)
    ]
    layers = {n: m for n, m in every if _factors(m)}
    trained = [parameter for layer in layers.values() for parameter in _factors(layer)]
    if not calls or not trained:
        raise CmloraError("healing needs calls of the model, and compact layers to train")
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []

    def loss_of(call: Call) -> Tensor:
        with torch.no_grad(), _watching(original, features) as wanted:
            wanted.append(call(original))
        with _watching(model, features) as found:
            found.append(call(model))
        parts = [_relative(a, b) for a, b in zip(found, wanted, strict=True)]
        loss = parts[-1]
        if len(parts) > 1:
            loss = loss + weight * torch.stack(parts[:-1]).mean()
        if excess:
            over = [
                (matrix_of(original.get_submodule(name)) - dense(layer.form())).abs().max()
                for name, layer in layers.items()
            ]
            loss = loss + excess * (torch.stack(over) - slack).square().mean()
        return loss

    def mean() -> float:
        with torch.no_grad():
            return fmean(float(loss_of(call)) for call in calls)

    before, kept = mean(), [parameter.detach().clone() for parameter in trained]
    try:
        for step in range(steps):
            loss = loss_of(calls[step % len(calls)])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        if not mean() < before:
            for parameter, value in zip(trained, kept, strict=True):
                parameter.detach().copy_(value)
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)
        for parameter in frozen:
            parameter.requires_grad_(True)
    return tuple(losses)


def blocks(model: nn.Module) -> tuple[str, ...]:
    """The names of a denoiser's blocks: members of its own lists of them, and one in the middle."""
    found = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList) and "blocks" in name:
            found += [f"{name}.{index}" for index in range(len(child))]
        elif name == "mid_block":
            found.append(name)
    return tuple(found)


def _factors(layer: nn.Module) -> list[nn.Parameter]:
    """What can be trained of a compact layer."""
    return [parameter for name, parameter in layer.named_parameters() if name.startswith("form_")]


@contextmanager
def _watching(model: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """The outputs of these modules, in the order they are made."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [model.get_submodule(name).register_forward_hook(keep) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    return functional.mse_loss(found, wanted) / wanted.square().mean().clamp(min=1e-12)
