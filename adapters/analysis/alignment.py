"""How far LoRAs push in the same directions, block by block, from the factors alone.

Everything follows from R x R products: two updates ``b1 a1`` and ``b2 a2`` have the inner product
``tr((b1^T b2)(a2 a1^T))``, at a cost of (O + I) R^2 instead of O I R for the dense matrices.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from cmlora.errors import CmloraError
from cmlora.lora import TEXT_ENCODERS, LoRA

_NUMBERED = re.compile(r"\w*(?:blocks|layers)\.\d+")
# Eigenvalues of a Gram matrix of half-precision factors below this share are rounding.
_NOISE = 1e-9


def block_of(module: str) -> str:
    """The part of the model a module belongs to, coarse enough to be read at a glance.

    >>> block_of("unet.down_blocks.1.attentions.0.proj_in"), block_of("unet.mid_block.resnets.0")
    ('unet.down_blocks.1', 'unet.mid_block')
    >>> block_of("text_encoder.text_model.encoder.layers.3.mlp.fc1")
    'text_encoder'
    """
    component, _, name = module.partition(".")
    if component in TEXT_ENCODERS:
        return component
    numbered = _NUMBERED.match(name)
    return f"{component}.{numbered[0] if numbered else name.partition('.')[0]}"


def gram(loras: Sequence[LoRA]) -> dict[str, Tensor]:
    """Inner products of all pairs of LoRAs, summed over each block.

    Args:
        loras: N of them.

    Returns:
        By block, (N, N) in float64, symmetric; the diagonal holds squared norms.

    Raises:
        CmloraError: if one module has different shapes in two LoRAs, which are then for different
            models.
    """
    count = len(loras)
    found: dict[str, Tensor] = {}
    for module in sorted({module for lora in loras for module in lora.updates}):
        table = found.setdefault(block_of(module), torch.zeros(count, count, dtype=torch.double))
        present = {
            index: lora.updates[module].factors()
            for index, lora in enumerate(loras)
            if module in lora.updates
        }
        for (i, (up, down)), (j, (other_up, other_down)) in combinations_with_replacement(
            present.items(), 2
        ):
            if up.shape[0] != other_up.shape[0] or down.shape[1] != other_down.shape[1]:
                names = f"{loras[i].name} and {loras[j].name}"
                raise CmloraError(
                    f"{module} has different shapes in {names}: they are for different models"
                )
            table[i, j] += ((up.T @ other_up) * (down @ other_down.T)).sum()
            table[j, i] = table[i, j]
    return found


def cosines(table: Tensor) -> Tensor:
    """Inner products as cosines; 0 where a LoRA changes nothing.

    Args:
        table: (N, N), see `gram`.

    Returns:
        (N, N), -1 to 1.
    """
    norms = table.diagonal().clamp(min=0).sqrt()
    scale = norms[:, None] * norms[None, :]
    return torch.where(scale > 0, table / scale.clamp(min=1e-300), 0.0).clamp(-1, 1)


@dataclass(frozen=True)
class Overlap:
    """How much two sets of directions have in common.

    Args:
        outputs: shared part of the directions written to, 0 to 1.
        inputs: shared part of the directions read from, 0 to 1.
        chance: what random directions of these ranks and widths would share.
    """

    outputs: float
    inputs: float
    chance: float

    @property
    def excess(self) -> float:
        """The larger of both beyond chance, 0 to 1."""
        room = 1 - self.chance
        return max(0.0, (max(self.outputs, self.inputs) - self.chance) / room) if room > 0 else 0.0


def overlap(one: LoRA, other: LoRA) -> dict[str, Overlap]:
    """The mean squared principal cosine of the two LoRAs' subspaces, by block.

    Modules count by the product of their norms in both LoRAs. Unlike the cosine of the updates it
    also sees LoRAs that use the same directions for different things.

    Returns:
        By block that both change; a module of one side only shares nothing and does not count.
    """
    sums: dict[str, list[float]] = {}
    for module in sorted(one.updates.keys() & other.updates.keys()):
        (up, down), (other_up, other_down) = (
            lora.updates[module].factors() for lora in (one, other)
        )
        weight = _size(up, down) * _size(other_up, other_down)
        outputs, chance_out = _shared(up, other_up)
        inputs, chance_in = _shared(down.T, other_down.T)
        row = sums.setdefault(block_of(module), [0.0] * 4)
        for place, value in enumerate((1.0, outputs, inputs, max(chance_out, chance_in))):
            row[place] += weight * value
    return {
        block: Overlap(*(value / row[0] for value in row[1:]))
        for block, row in sums.items()
        if row[0] > 0
    }


def _size(up: Tensor, down: Tensor) -> float:
    return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


def _shared(one: Tensor, other: Tensor) -> tuple[float, float]:
    """|Q1^T Q2|^2 / min(rank) of two column spaces (D, R), and its mean over random subspaces."""
    whiten, other_whiten = _whitener(one), _whitener(other)
    ranks = whiten.shape[1], other_whiten.shape[1]
    if not min(ranks):
        return 0.0, 0.0
    cosine = whiten.T @ (one.T @ other) @ other_whiten
    share = float(cosine.square().sum()) / min(ranks)
    return min(share, 1.0), max(ranks) / one.shape[0]


def _whitener(columns: Tensor) -> Tensor:
    """(R, r) such that ``columns @ it`` is an orthonormal basis of the column space."""
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    keep = values > _NOISE * values[-1].clamp(min=1e-300)
    scaled: Tensor = vectors[:, keep] / values[keep].sqrt()
    return scaled
