"""Training the compact layers of a model to answer as the original did; no pictures are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cmlora.adapters.compression.layers import CompactConv2d, CompactLinear
from cmlora.errors import CmloraError

Call = Callable[[nn.Module], Tensor]
"""Runs a model on some inputs and returns its output, for example ``lambda m: m(x, t, text)``."""


def heal(
    model: nn.Module,
    original: nn.Module,
    calls: Sequence[Call],
    steps: int = 200,
    rate: float = 1e-3,
    features: Sequence[str] = (),
    weight: float = 1.0,
) -> tuple[float, ...]:
    """Distil the original into the factors of the compact layers, after PELA (arXiv:2310.10700).

    The loss of a call is the mean squared difference of the outputs plus ``weight`` times its mean
    over the outputs of the modules in ``features``, each relative to the original's mean square.
    Only the tensors of compact layers change.

    Args:
        model: compressed; changed in place.
        original: what it should answer like, left alone.
        calls: taken in turn.
        steps: of Adam, with the rate falling to zero along a cosine.
        rate: where it starts.
        features: names of modules that both models have, for example the blocks of a UNet.
        weight: of the features.

    Returns:
        The loss before each step.

    Raises:
        CmloraError: if there is no call or nothing to train.
    """
    layers = [m for m in model.modules() if isinstance(m, CompactLinear | CompactConv2d)]
    trained = [p for m in layers for n, p in m.named_parameters() if n.startswith("form_")]
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
    try:
        for step in range(steps):
            call = calls[step % len(calls)]
            with torch.no_grad(), _watching(original, features) as wanted:
                wanted.append(call(original))
            with _watching(model, features) as found:
                found.append(call(model))
            parts = [_relative(a, b) for a, b in zip(found, wanted, strict=True)]
            loss = parts[-1]
            if len(parts) > 1:
                loss = loss + weight * torch.stack(parts[:-1]).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)
        for parameter in frozen:
            parameter.requires_grad_(True)
    return tuple(losses)


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
