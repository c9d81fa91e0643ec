"""Which step of which run a denoiser call belongs to, found without the pipeline's help."""

from __future__ import annotations

import logging
import math
import numbers
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

import torch

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tick:
    """Where a run is at a denoiser call.

    Args:
        index: 0 .. count - 1. Counts model calls of the scheduler, so a second-order sampler
            that evaluates the denoiser twice per step has about twice as many.
        count: how many there will be.
        timestep: the scheduler's value.
        branch: tells apart several calls at one index (guidance in separate calls).
        fresh: this is the first call of a run.
        repeated: this index had a call before.
        sigma: the noise level as the scheduler counts it, if it has noise levels.
    """

    index: int
    count: int
    timestep: float
    branch: str = ""
    fresh: bool = False
    repeated: bool = False
    sigma: float | None = None


class Tracker(Protocol):
    """Knows where a run is."""

    pipe: Any

    def tick(self, timestep: Any, context: Any = None) -> Tick:
        """Note a call of the denoiser."""

    def reset(self) -> None:
        """Forget the run: whatever is called next begins a new one."""


class StepTracker:
    """Finds the step from the timestep a denoiser is called with.

    The timesteps a pipeline loops over are views into ``scheduler.timesteps``, so their address
    tells the step exactly, with repeated values and without waiting for the device. Where a
    pipeline computes a new tensor from it, the scheduler's own ``step_index`` or, as the last
    resort, the value does, which then has to be read back from the device.

    A run begins when the scheduler has a new tensor of timesteps, when the step goes back, or
    after `reset`. A timestep that is in no table makes a run of a single step.

    Args:
        pipe: anything with a ``scheduler``, and ``num_timesteps`` if it runs only a part of the
            scheduler's timesteps.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._calls: Counter[str] = Counter()
        self._table: torch.Tensor | None = None
        self._values: list[float] = []
        self._warned = False
        self.reset()

    def reset(self) -> None:
        """Forget the run: whatever is called next begins a new one."""
        self._table = None
        self._values = []
        self._position = -1
        self._start = 0
        self._count = 0
        self._calls.clear()

    def tick(self, timestep: Any, context: Any = None) -> Tick:
        """Note a call of the denoiser.

        Args:
            timestep: what the denoiser is called with: a number or a tensor, () or (B,).
            context: diffusers' ``CacheContext`` of the call, if the pipeline set one.
        """
        name = "" if context is None else str(context.name)
        table = _timesteps(self.pipe)
        if table is not self._table:
            self.reset()
            self._table = table
            self._values = [] if table is None else [float(value) for value in table.tolist()]
        position = getattr(context, "step_index", None)
        if position is None:
            position = self._locate(timestep, name)
        if position is None:
            if self._values and not self._warned:
                self._warned = True
                _logger.warning("timestep %s is in no schedule: every call is a run", timestep)
            self.reset()
            return Tick(0, 1, _value(timestep), name, fresh=True)
        fresh = self._position < 0 or position < self._position
        if fresh:
            self._start = 0 if getattr(context, "step_index", None) is not None else position
            self._count = self._length(context)
        repeated = position == self._position and not fresh
        if not repeated:
            self._calls.clear()
        ordinal = self._calls[name]
        self._calls[name] += 1
        self._position = position
        index = position - self._start
        if index >= self._count:
            self._count = max(len(self._values) - self._start, index + 1)
        value = self._values[position] if position < len(self._values) else _value(timestep)
        branch = f"{name}#{ordinal}" if ordinal else name
        sigma = _sigma(self.pipe.scheduler, position, value)
        return Tick(index, self._count, value, branch, fresh, repeated, sigma)

    def _locate(self, timestep: Any, name: str) -> int | None:
        """The position of a timestep in the scheduler's table."""
        if self._table is None:
            return None
        if isinstance(timestep, torch.Tensor):
            position = _offset(timestep, self._table)
            if position is not None:
                return position
        position = self._ask_scheduler()
        if position is None:
            position = self._find(_value(timestep), name)
        if position is None and hasattr(self.pipe.scheduler, "step_index"):
            position = 0  # it counts, and has not begun
        return position

    def _find(self, value: float, name: str) -> int | None:
        """The position of a value: this one, the next one that has it, or else the first one."""
        current, values = self._position, self._values
        if current >= 0 and values[current] == value:
            # the table repeats the value (a second-order sampler), and this branch had its call
            again = current + 1 < len(values) and values[current + 1] == value
            return current + 1 if again and self._calls[name] else current
        later = (i for i in range(current + 1, len(values)) if values[i] == value)
        first = (i for i in range(current + 1) if values[i] == value)
        return next(later, next(first, None))

    def _ask_scheduler(self) -> int | None:
        """The scheduler's own count of its steps, if it keeps one and knows it already."""
        scheduler = self.pipe.scheduler
        position = getattr(scheduler, "step_index", None)
        if position is None:  # before the first step
            position = getattr(scheduler, "begin_index", None)
        known = isinstance(position, int) and 0 <= position < len(self._values)
        return position if known else None

    def _length(self, context: Any) -> int:
        """How many steps the run that begins now has."""
        stated = getattr(context, "num_inference_steps", None)
        if stated is None:
            stated = getattr(self.pipe, "num_timesteps", None)
        remaining = len(self._values) - self._start
        if isinstance(stated, int) and 0 < stated <= max(remaining, 1):
            return stated
        return max(remaining, 1)


def _timesteps(pipe: Any) -> torch.Tensor | None:
    """The scheduler's timesteps, (T,), if it has any."""
    table = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    return table if isinstance(table, torch.Tensor) and table.ndim == 1 else None


def _offset(timestep: torch.Tensor, table: torch.Tensor) -> int | None:
    """Where in the table a view of one of its elements points."""
    if timestep.dtype != table.dtype or timestep.device != table.device or not len(table):
        return None
    stride = table.element_size() * max(table.stride(0), 1)
    position, rest = divmod(timestep.data_ptr() - table.data_ptr(), stride)
    return position if rest == 0 and 0 <= position < len(table) else None


def _sigma(scheduler: Any, position: int, timestep: float) -> float | None:
    """The noise level at a position of the table: 0 to 1 for flow models, else sigma / alpha."""
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor) and position < len(sigmas):
        return float(sigmas[position])
    products = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(products, torch.Tensor) and 0 <= timestep < len(products):
        product = max(float(products[int(timestep)]), 1e-8)
        return math.sqrt((1 - product) / product)
    return None


def _value(timestep: Any) -> float:
    """A timestep as a number; waits for the device if it is a tensor there."""
    if isinstance(timestep, torch.Tensor):
        return float(timestep.reshape(-1)[0])
    return float(timestep) if isinstance(timestep, numbers.Real) else 0.0
