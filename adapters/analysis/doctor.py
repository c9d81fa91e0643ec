"""Everything that can be said about a set of LoRAs from their files, in seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from cmlora.adapters.analysis.advice import Advice, Findings, advise, collision
from cmlora.adapters.analysis.alignment import compare, cosines
from cmlora.adapters.analysis.balance import sizes, stacking
from cmlora.adapters.analysis.detail import detail
from cmlora.adapters.analysis.mismatch import (
    bases,
    check_families,
    shared_triggers,
    text_encoders,
)
from cmlora.adapters.analysis.spikes import spikes
from cmlora.errors import CmloraError
from cmlora.lora import LoRA


@dataclass(frozen=True)
class Report:
    """What `examine` found.

    Args:
        family: of base models.
        findings: the measurements.
        advice: what follows from them.
    """

    family: str
    findings: Findings
    advice: tuple[Advice, ...]

    def pairs(self) -> list[dict[str, Any]]:
        """One row per pair: cosine, overlap, stacking, and both by block; JSON types."""
        found = self.findings
        rows = []
        for i, j in combinations(range(len(found.names)), 2):
            shared = found.overlaps[i, j]
            both = torch.tensor([i, j])
            rows.append(
                {
                    "loras": [found.names[i], found.names[j]],
                    "cosine": float(cosines(found.whole)[i, j]),
                    "shared_directions": collision(shared),
                    "stacking": stacking(found.whole[both][:, both], (1.0, 1.0)),
                    "blocks": {
                        block: {
                            "cosine": float(cosines(table)[i, j]),
                            "shared_outputs": shared[block].outputs,
                            "shared_inputs": shared[block].inputs,
                            "chance": shared[block].chance,
                        }
                        for block, table in found.blocks.items()
                        if block in shared
                    },
                }
            )
        return rows

    def json(self) -> dict[str, Any]:
        """The report in JSON types."""
        found = self.findings
        loras = {
            name: {
                "norm": norm,
                "detail": depth if math.isfinite(depth) else None,
                "frequency": found.frequency.get(name),
                "category": found.categories.get(name),
                "text_encoders": list(found.encoders[name]),
                "base": found.bases.get(name),
                "spikes": [vars(spike) for spike in found.spikes[name]],
            }
            for name, norm, depth in zip(found.names, found.norms, found.detail, strict=True)
        }
        return {
            "family": self.family,
            "loras": loras,
            "pairs": self.pairs(),
            "shared_triggers": {phrase: list(names) for phrase, names in found.triggers.items()},
            "advice": [vars(advice) for advice in self.advice],
        }


def examine(
    loras: Sequence[LoRA],
    base: str | None = None,
    frequency: Mapping[str, float] | None = None,
) -> Report:
    """Measure how LoRAs interfere and say what to do about it. No model is needed.

    Args:
        loras: with different names.
        base: what they are to be used with, see `check_families`.
        frequency: measured high-frequency shares by name, of as many LoRAs as there are profiles.

    Raises:
        CmloraError: if there is no LoRA, two have one name, one is empty, or they are for
            different models.
    """
    names = tuple(lora.name for lora in loras)
    if not names:
        raise CmloraError("no LoRA to examine")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CmloraError(f"two LoRAs are called {twice[0]}")
    for lora in loras:
        if not lora.updates:
            raise CmloraError(f"{lora.name} has no updates")
    kind = check_families(loras, base)
    tables, overlaps, spectra = compare(loras)
    found = Findings(
        names=names,
        norms=sizes(tables),
        whole=torch.stack(list(tables.values())).sum(0),
        blocks=tables,
        overlaps=overlaps,
        spikes={lora.name: spikes(lora, own) for lora, own in zip(loras, spectra, strict=True)},
        detail=detail(tables),
        frequency={k: v for k, v in (frequency or {}).items() if k in names and math.isfinite(v)},
        categories={lora.name: lora.category for lora in loras if lora.category},
        encoders=text_encoders(loras),
        triggers=shared_triggers(loras),
        bases=bases(loras),
    )
    return Report(kind, found, advise(found))
