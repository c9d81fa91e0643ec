"""How strong LoRAs may be, layer by layer, on what a model's attention really sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from cmlora.adapters.analysis.advice import Advice
from cmlora.adapters.analysis.strength import ROOM, Bound, attention_rank, bound_of
from cmlora.adapters.calibration import BASE, Calibration, Seen
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update, stack

TOGETHER = "all together"


@dataclass(frozen=True)
class Saturation:
    """What was found for one LoRA, or for all together at their weights.

    Args:
        name: of the LoRA.
        layers: by module, see `cmlora.adapters.analysis.strength.Bound`; strengths are those of
            the LoRA, and multiples of all weights for all together.
        safest: the smallest safe strength of a layer.
        where: that layer.
        ranks: by attention module, mean rank of the attention over its heads for the model alone,
            and with the LoRA at its weight.
    """

    name: str
    layers: dict[str, Bound]
    safest: float
    where: str
    ranks: dict[str, tuple[float, float]]


def saturation(
    calibration: Calibration,
    loras: Sequence[LoRA],
    weights: Sequence[float],
    room: float = ROOM,
) -> tuple[Saturation, ...]:
    """Measure every LoRA, and all at their weights together if there are several.

    Args:
        calibration: of the model they are used with.
        loras: with different names.
        weights: one each.
        room: how far beyond its own range the model may be pushed.

    Raises:
        CmloraError: if no layer that a LoRA changes was sampled.
    """
    sampled = {
        module: seen
        for module, seen in calibration.seen.get(BASE, {}).items()
        if seen.inputs is not None and seen.outputs is not None
    }
    heads: Mapping[str, int] = calibration.about.get("heads", {})
    rows = list(zip(loras, weights, strict=True))
    if len(loras) > 1:
        rows.append((stack(list(zip(loras, weights, strict=True)), TOGETHER), 1.0))
    found = []
    for lora, weight in rows:
        layers = {
            module: bound_of(*_rows(sampled[module]), update, room)
            for module, update in lora.updates.items()
            if module in sampled
        }
        if not layers:
            raise CmloraError(
                f"the calibration data has no samples of what {lora.name} changes; measure it with "
                "cmlora calib"
            )
        where = min(layers, key=lambda module: (layers[module].safest, module))
        ranks = _ranks(sampled, heads, lora, weight)
        found.append(Saturation(lora.name, layers, layers[where].safest, where, ranks))
    return tuple(found)


def advise(found: Sequence[Saturation], weights: Mapping[str, float]) -> tuple[Advice, ...]:
    """What to do about LoRAs that push a layer too far."""
    said = []
    for row in found:
        weight = weights.get(row.name, 1.0)
        if row.safest >= abs(weight):
            continue
        over = sum(own.safest < abs(weight) for own in row.layers.values())
        do = f"keep {row.name} at {row.safest:.2g} or below"
        if row.name == TOGETHER:
            do = f"multiply all weights by {row.safest:.2g} if they are merged"
        said.append(
            Advice(
                "weights",
                do,
                f"at {weight:g} it pushes {over} of {len(row.layers)} layers beyond {ROOM:g} times "
                f"the model's own range, {row.where} first",
            )
        )
    return tuple(said)


def to_json(found: Sequence[Saturation]) -> list[dict[str, object]]:
    """The findings in JSON types; a strength without a limit is nothing."""
    return [
        {
            "name": row.name,
            "safest": _finite(row.safest),
            "where": row.where,
            "layers": {
                module: {**own._asdict(), "safest": _finite(own.safest)}
                for module, own in row.layers.items()
            },
            "ranks": {module: list(pair) for module, pair in row.ranks.items()},
        }
        for row in found
    ]


def _rows(seen: Seen) -> tuple[Tensor, Tensor]:
    assert seen.inputs is not None
    assert seen.outputs is not None
    return seen.inputs, seen.outputs


def _ranks(
    sampled: Mapping[str, Seen], heads: Mapping[str, int], lora: LoRA, weight: float
) -> dict[str, tuple[float, float]]:
    found = {}
    for module, count in heads.items():
        names = [f"{module}.to_q", f"{module}.to_k"]
        if not all(name in sampled for name in names):
            continue
        ranks = []
        for strength in (0.0, weight):
            q, k = (
                _made(sampled[name], lora.updates.get(name), strength).chunk(count, 1)
                for name in names
            )
            ranks.append(fmean(attention_rank(a, b) for a, b in zip(q, k, strict=True)))
        found[module] = (ranks[0], ranks[1])
    return found


def _made(seen: Seen, update: Update | None, strength: float) -> Tensor:
    """(L, O): the outputs of a layer with an update."""
    inputs, outputs = _rows(seen)
    if update is None or not strength:
        return outputs.double()
    up, down = update.factors()
    made: Tensor = outputs.double() + strength * (inputs.double() @ down.T) @ up.T
    return made


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
