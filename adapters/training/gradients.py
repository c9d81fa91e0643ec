"""Gradients: scaled for half precision, averaged over processes, estimated before a training."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Reduced:
    """The processes of ``accelerate launch``, or one.

    Args:
        precision: "no", "fp16", "bf16", or "auto" for what ``accelerate launch`` was told.
    """

    def __init__(self, precision: str = "auto") -> None:
        # Without this accelerate takes a machine without accelerators for one process.
        wanted = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
        self._state = PartialState(cpu=wanted or not torch.accelerator.is_available())
        self.device: torch.device = self._state.device
        self.rank, self.world = self._state.process_index, self._state.num_processes
        self.main = bool(self._state.is_main_process)
        if precision == "auto":
            precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        self.precision = precision if precision in _DTYPES else "no"

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Replaces gradients by their mean over the processes."""
        if self.world == 1:
            return
        for gradient in gradients:
            gradient.copy_(reduce(gradient, "mean"))

    def mean(self, value: float) -> float:
        """The mean of a number over the processes."""
        if self.world == 1:
            return value
        return float(reduce(torch.tensor(value, device=self.device), "mean"))

    def wait(self) -> None:
        """Until all processes are here."""
        self._state.wait_for_everyone()


class Scaled:
    """Mixed precision.

    Args:
        precision: "no", "fp16" or "bf16".
        device: where.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        self.dtype, self.device = _DTYPES.get(precision), device
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        """Around the forward pass."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def input_dtype(self, model: nn.Module) -> torch.dtype:
        """What the model takes: its own precision."""
        return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def backward(self, loss: Tensor) -> None:
        """Adds the loss's gradients."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Brings the gradients back to their size."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step; none where a gradient in half precision overflowed."""
        self._scaler.step(optimizer)
        self._scaler.update()

    def state(self) -> dict[str, Any]:
        """What a resumed training needs."""
        found: dict[str, Any] = self._scaler.state_dict()
        return found

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up a `state`."""
        if state:
            self._scaler.load_state_dict(state)


def estimate(
    models: Mapping[str, nn.Module],
    layers: Mapping[str, Sequence[str]],
    loss: Callable[[int], Tensor],
    samples: int,
) -> dict[str, dict[str, Tensor]]:
    """Average gradients of the layers' weights, each freed as soon as it is added up.

    Args:
        models: by part.
        layers: names of the layers in each part.
        loss: of a batch by number.
        samples: how many batches.

    Returns:
        By part and layer, shaped like the weights.
    """
    found: dict[str, dict[str, Tensor]] = {part: {} for part in models}
    handles = []

    def collect(part: str, name: str) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            share = weight.grad.float() / samples
            before = found[part].get(name)
            found[part][name] = share if before is None else before.add_(share)
            weight.grad = None

        return add

    weights = []
    for part, model in models.items():
        for name in layers[part]:
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weights.append(weight)
            weight.requires_grad_(True)
            register: Any = weight.register_post_accumulate_grad_hook
            handles.append(register(collect(part, name)))
    try:
        for number in range(samples):
            torch.autograd.backward(loss(number))
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights:
            weight.requires_grad_(False)
    return found
