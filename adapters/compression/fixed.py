"""The same rank everywhere."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cmlora.adapters.compression.rule import Cost, Spectra
from cmlora.errors import CmloraError

_USUAL = 16


def fixed(
    spectra: Spectra, costs: Mapping[str, Cost], value: float | None = None
) -> dict[str, Tensor]:
    """The first ``value`` singular values of every module; 16, or all there are, if not given.

    Raises:
        CmloraError: if the rank is not a whole number from 1 to the largest of all modules.
    """
    ceiling = max((cost.whole // cost.each for cost in costs.values()), default=1)
    if value is None:
        value = min(_USUAL, ceiling)
    if value < 1 or value != int(value):
        raise CmloraError(f"fixed keeps a rank of 1 or more, not {value:g}")
    if value > ceiling:
        raise CmloraError(f"rank {value:g} is not possible; this LoRA allows 1 to {ceiling}")
    return {module: values[: int(value)] for module, values in spectra.items()}
