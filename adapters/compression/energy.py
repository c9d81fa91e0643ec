"""As much rank as each module needs for a share of its energy."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cmlora.adapters.compression.rule import Cost, Spectra, check_share


def energy(spectra: Spectra, costs: Mapping[str, Cost], value: float = 0.99) -> dict[str, Tensor]:
    """The fewest values of every module with ``sum_kept s^2 >= value * sum s^2``.

    The relative error of a module is then at most ``sqrt(1 - value)`` (Eckart-Young).

    Raises:
        CmloraError: if the share is not above 0 and at most 1.
    """
    check_share("energy", value)
    return {module: values[: least(values, value)] for module, values in spectra.items()}


def least(values: Tensor, share: float) -> int:
    """How many of the descending values hold this share of the energy; 1 or more."""
    squares = values.square()
    lost = squares.flip(0).cumsum(0).flip(0)  # [k]: lost by keeping k
    # The tail is summed, not the head, so that a share of 1 keeps every value that is not zero.
    return max(1, int((lost > (1 - share) * squares.sum()).sum()))
