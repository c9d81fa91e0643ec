"""SNELLA: SNELL with a mixed kernel, whose non-zero entries are shared out among the layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from cmlora.adapters.tuners.snell import SnellConfig, SnellLayer, distances


@dataclass
class SnellaConfig(SnellConfig):
    """Settings of SNELLA.

    Args:
        mix: strength of the softmax at the start; the paper's 1 makes a start that adds 1 / O to
            every entry, 0 one that changes nothing.
    """

    mix: float = 0.0
    method: ClassVar[str] = "snella"


class SnellaLayer(SnellLayer):
    """``K + a softmax(K / g) + b``, sparsified as in SNELL; the softmax runs over the outputs.

    arXiv:2510.24037. The scalars a, g and b are trained too. Each layer has a sparsity of its own,
    which is saved; `Allocator` sets it.
    """

    method = "snella"
    trained = ("input", "output", "mix", "heat", "offset")
    stored = ("sparsity_share",)

    def start(self, name: str) -> dict[str, Tensor]:
        config = self.config[name]
        scalars = {"mix": torch.tensor([float(config.mix)]), "heat": torch.ones(1)}
        share = torch.tensor([float(config.sparsity)])
        return (
            super().start(name)
            | scalars
            | {
                "offset": torch.zeros(1),
                "sparsity_share": share,
            }
        )

    def sparsity(self, name: str) -> float:
        return float(self.tensor(name, "sparsity_share"))

    def kernel(self, tensors: tuple[Tensor, ...], config: SnellConfig) -> Tensor:
        inputs, outputs, mix, heat, offset = tensors
        plain = config.factor * distances(inputs, outputs)
        return plain + mix * torch.softmax(plain / heat, 0) + offset


@dataclass
class Allocator:
    """Shares a falling number of non-zero entries out among the layers of an adapter.

    After each backward pass `observe` updates every layer's score: smoothed sensitivity
    ``|p dL/dp|`` times its smoothed uncertainty, averaged over its vectors. `allocate` then gives a
    layer its share of the budget, which falls cubically from the start's to the target's.

    Args:
        model: with a SNELLA adapter.
        name: of the adapter.
        target: share of the entries that are non-zero at the end.
        steps: of the fall.
        sensitivity_decay: of the average of the sensitivity.
        uncertainty_decay: of the average of its changes.
    """

    model: nn.Module
    name: str
    target: float
    steps: int
    sensitivity_decay: float = 0.85
    uncertainty_decay: float = 0.85
    averages: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = [m for m in self.model.modules() if isinstance(m, SnellaLayer)]
        self.layers = [m for m in found if self.name in m.r]

    @torch.no_grad()
    def observe(self) -> None:
        """Takes the gradients of the last backward pass into the averages."""
        for number, layer in enumerate(self.layers):
            for title in ("input", "output"):
                parameter = layer.held(self.name, title)
                if parameter.grad is None:
                    continue
                now = (parameter * parameter.grad).abs()
                zero = torch.zeros_like(now)
                mean, spread = self.averages.get((number, title), (zero, zero))
                mean = self.sensitivity_decay * mean + (1 - self.sensitivity_decay) * now
                spread = self.uncertainty_decay * spread
                spread = spread + (1 - self.uncertainty_decay) * (now - mean).abs()
                self.averages[number, title] = mean, spread

    def allocate(self, step: int) -> list[int]:
        """Sets the sparsity of every layer for a step; returns their numbers of non-zeros."""
        sizes = [layer.matrix().numel() for layer in self.layers]
        first = [1 - layer.config[self.name].sparsity for layer in self.layers]
        start = sum(share * size for share, size in zip(first, sizes, strict=True))
        left = max(0.0, 1 - step / self.steps) ** 3
        end = self.target * sum(sizes)
        counts = shared_out(round(end + (start - end) * left), self._scores(), sizes)
        for layer, count, size in zip(self.layers, counts, sizes, strict=True):
            layer.held(self.name, "sparsity_share").fill_(1 - count / size)
        return counts

    def _scores(self) -> list[float]:
        scores = [0.0] * len(self.layers)
        for (number, _), (mean, spread) in self.averages.items():
            scores[number] += float((mean * spread).mean())
        return scores


def shared_out(budget: int, scores: list[float], sizes: list[int]) -> list[int]:
    """Whole shares of a budget by score, none larger than its size; equal ones without scores."""
    counts = [0] * len(sizes)
    open_ones = set(range(len(sizes)))
    rest = min(budget, sum(sizes))
    while rest > 0 and open_ones:
        total = sum(scores[n] for n in open_ones)
        exact = {
            n: rest * (scores[n] / total if total > 0 else 1 / len(open_ones)) for n in open_ones
        }
        full = {n for n in open_ones if exact[n] >= sizes[n] - counts[n]}
        if not full:
            given = {n: int(exact[n]) for n in open_ones}
            order = sorted(open_ones, key=lambda n: (given[n] - exact[n], n))
            for n in order[: rest - sum(given.values())]:
                given[n] += 1
            for n, more in given.items():
                counts[n] += more
            return counts
        for n in full:
            counts[n] = sizes[n]
        rest -= sum(sizes[n] for n in full)
        open_ones -= full
    return counts
