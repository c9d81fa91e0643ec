"""Spikes brought down to the size of their surroundings; the rank stays."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from torch import Tensor

from cmlora.adapters.compression.rule import Cost, Spectra
from cmlora.errors import CmloraError


def clip(spectra: Spectra, costs: Mapping[str, Cost], value: float = 2.0) -> dict[str, Tensor]:
    """No singular value above ``value`` times the median module's first one.

    The default is below what `cmlora.adapters.analysis.spikes` calls a spike.

    Raises:
        CmloraError: if the limit is not positive.
    """
    if not value > 0:
        raise CmloraError(f"clip needs a limit above 0, not {value:g}")
    firsts = [float(values[0]) for values in spectra.values() if values[0] > 0]
    limit = value * median(firsts) if firsts else 0.0
    return {module: values.clamp(max=limit) for module, values in spectra.items()}
