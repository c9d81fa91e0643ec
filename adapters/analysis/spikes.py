"""Updates that are one loud direction: they shift every picture, and break stacks of LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from cmlora.adapters.analysis.alignment import Side
from cmlora.lora import LoRA, Update

SHARE = 0.8
"""From this share of the energy on, the first direction is the update."""
LIFT = 3.0
"""How far a spike stands above the LoRA's ordinary modules."""
RANK = 4
"""Below this nominal rank a loud first direction is what the file was made for."""


@dataclass(frozen=True)
class Spike:
    """A module whose update is nearly one direction, and a loud one.

    Args:
        module: its name.
        share: of the energy in the first singular direction, 0 to 1.
        lift: first singular value over the LoRA's median one.
    """

    module: str
    share: float
    lift: float


def spectrum(update: Update) -> Tensor:
    """Singular values of an update (R), descending, in float64; see `Side.spectrum`."""
    return Side(update).spectrum


def first_share(values: Tensor) -> float:
    """Share of the energy in the first of the singular values; 0 if there is none."""
    energy = values.square()
    whole = float(energy.sum())
    return float(energy[0]) / whole if whole > 0 else 0.0


def spikes(lora: LoRA, spectra: Mapping[str, Tensor] | None = None) -> tuple[Spike, ...]:
    """The spikes of a LoRA, the loudest first.

    Args:
        lora: which.
        spectra: singular values by module, if they are known.
    """
    if spectra is None:
        spectra = {module: spectrum(update) for module, update in lora.updates.items()}
    firsts = {module: float(values[0]) for module, values in spectra.items()}
    heard = [first for first in firsts.values() if first > 0]
    if not heard:
        return ()
    usual = median(heard)
    found = [
        Spike(module, first_share(spectra[module]), firsts[module] / usual)
        for module, update in lora.updates.items()
        if update.rank >= RANK
    ]
    loud = [spike for spike in found if spike.share >= SHARE and spike.lift >= LIFT]
    return tuple(sorted(loud, key=lambda spike: (-spike.lift, spike.module)))
