"""One threshold on normalised spectra: modules with a steep spectrum give up more rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cmlora.adapters.compression.rule import Cost, Spectra, check_share, total

_HALVINGS = 60


def welore(spectra: Spectra, costs: Mapping[str, Cost], value: float = 0.5) -> dict[str, Tensor]:
    """Values with ``(s - min s) / (max s - min s) >= t``, for the lowest t within the budget.

    WeLore's rule (arXiv:2407.11239) with the budget in parameters and the threshold found by
    bisection instead of a table. No module costs more than before; each keeps one value.

    Args:
        spectra: see `cmlora.adapters.compression.rule.Spectra`.
        costs: of the modules.
        value: share of the parameters that may be kept.

    Raises:
        CmloraError: if the share is not above 0 and at most 1.
    """
    check_share("welore", value)
    normal = {module: _normalised(values) for module, values in spectra.items()}

    def ranks(threshold: float) -> dict[str, int]:
        return {m: max(1, int((z >= threshold).sum())) for m, z in normal.items()}

    def spent(threshold: float) -> int:
        return sum(costs[module].of(rank) for module, rank in ranks(threshold).items())

    allowed = value * total(costs) * (1 + 1e-12)
    low, high = 0.0, 1.0 + 1e-9
    if spent(low) <= allowed:
        high = low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= allowed else (middle, high)
    kept = ranks(high)
    return {module: values[: kept[module]] for module, values in spectra.items()}


def _normalised(values: Tensor) -> Tensor:
    room = values[0] - values[-1]
    return (values - values[-1]) / room if room > 0 else torch.ones_like(values)
