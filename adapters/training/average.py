"""A running average of what is trained, which is often better than its last state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """Exponential moving average, warmed up: the decay is ``min(decay, (1 + n) / (10 + n))``.

    Args:
        tensors: that are averaged, by name.
        decay: the most that is kept of the average at an update; 0 switches it off.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self.tensors, self.decay, self.count = dict(tensors), decay, 0
        self.values = {k: t.detach().clone() for k, t in tensors.items()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the present tensors."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for key, value in self.values.items():
            value.lerp_(self.tensors[key].detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the tensors are their average; afterwards what they were."""
        kept = {key: self.tensors[key].detach().clone() for key in self.values}
        with torch.no_grad():
            for key, value in self.values.items():
                self.tensors[key].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for key, value in kept.items():
                    self.tensors[key].copy_(value)
