"""The state of a training: parameters, their running average, optimizer, step; on disk and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn


class Averaged:
    """Exponential moving average of parameters, warmed up: min(decay, (1 + n) / (10 + n)).

    Args:
        modules: whose parameters are averaged.
        decay: the most that is kept of the average at an update.
    """

    def __init__(self, modules: nn.Module, decay: float = 0.999) -> None:
        self.modules, self.decay, self.count = modules, decay, 0
        self.values = [p.detach().clone() for p in modules.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present parameters."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, list(self.modules.parameters()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the parameters are their average; afterwards what they were."""
        parameters: list[Tensor] = list(self.modules.parameters())
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_copy_(parameters, self.values)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, kept)


class Checkpoint:
    """Keeps a training on disk, whole or not at all, so that it continues after an interruption.

    Args:
        path: the file.
        models: what is trained.
        average: of the same parameters, if one is kept.
        optimizer: that trains them.
    """

    def __init__(
        self,
        path: Path,
        models: nn.Module,
        average: Averaged | None,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.path, self.models, self.average, self.optimizer = path, models, average, optimizer

    def resume(self) -> int:
        """Take up what was saved last; gives the step to continue at, 0 if nothing was saved."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        self.models.load_state_dict(state["models"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.values, self.average.count = state["average"], state["count"]
        step: int = state["step"]
        return step

    def save(self, step: int) -> None:
        """Write the state after `step` steps."""
        state = {
            "models": self.models.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": step,
        }
        if self.average is not None:
            state |= {"average": self.average.values, "count": self.average.count}
        new = self.path.with_suffix(".new")
        torch.save(state, new)
        new.replace(self.path)
