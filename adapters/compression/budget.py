"""A number of parameters, spent where it buys the most."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cmlora.adapters.compression.rule import Cost, Spectra, check_share, total


def budget(spectra: Spectra, costs: Mapping[str, Cost], value: float = 0.5) -> dict[str, Tensor]:
    """The directions with most energy per parameter over all modules, as many as fit.

    The energy gained by one more rank never grows within a module, so buying in the order of
    ``s^2 / each`` loses less than one rank to the best choice. Every module keeps one.

    Args:
        spectra: see `cmlora.adapters.compression.rule.Spectra`.
        costs: of the modules.
        value: share of the parameters that may be kept.

    Raises:
        CmloraError: if the share is not above 0 and at most 1.
    """
    check_share("budget", value)
    ranks = dict.fromkeys(spectra, 1)
    left = value * total(costs) * (1 + 1e-12) - sum(cost.of(1) for cost in costs.values())
    offers = sorted(
        (-(float(s) ** 2) / costs[module].each, index, module)
        for module, values in spectra.items()
        for index, s in enumerate(values.tolist())
    )
    for _, index, module in offers:
        if index != ranks[module]:  # the first is in; after one that did not fit nothing follows
            continue
        price = costs[module].of(index + 1) - costs[module].of(index)
        if price <= left:
            ranks[module] += 1
            left -= price
    return {module: values[: ranks[module]] for module, values in spectra.items()}
