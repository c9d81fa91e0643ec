"""What all rules for shrinking spectra have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from cmlora.errors import CmloraError


class Cost(NamedTuple):
    """What a matrix costs in numbers.

    Args:
        each: numbers per rank: O + I, with I flattened over the kernel.
        whole: numbers of the form it is in now, which is kept if factors are no smaller.
    """

    each: int
    whole: int

    def of(self, rank: int) -> int:
        """Numbers at this rank."""
        return min(rank * self.each, self.whole)


Spectra = Mapping[str, Tensor]
"""Singular values by module: (R), descending, float64."""
Rule = Callable[..., dict[str, Tensor]]
"""``rule(spectra, costs, value) -> spectra``: as long or shorter, at least one value each."""


def check_share(name: str, value: float) -> None:
    """Raises `CmloraError` unless the value is above 0 and at most 1."""
    if not 0 < value <= 1:
        raise CmloraError(f"{name} keeps a share above 0 and up to 1, not {value:g}")


def total(costs: Mapping[str, Cost]) -> int:
    """Numbers of everything as it is."""
    return sum(cost.whole for cost in costs.values())
