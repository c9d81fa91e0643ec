"""The same rank everywhere."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cmlora.adapters.compression.rule import Cost, Spectra
from cmlora.errors import CmloraError


def fixed(spectra: Spectra, costs: Mapping[str, Cost], value: float = 16) -> dict[str, Tensor]:
    """The first ``value`` singular values of every module.

    Raises:
        CmloraError: if the rank is not a whole number of 1 or more.
    """
    if value < 1 or value != int(value):
        raise CmloraError(f"fixed keeps a rank of 1 or more, not {value:g}")
    return {module: values[: int(value)] for module, values in spectra.items()}
