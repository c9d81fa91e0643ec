"""How far LoRAs push in the same directions, block by block, from the factors alone.

Everything follows from R x R products: two updates ``b1 a1`` and ``b2 a2`` have the inner product
``tr((b1^T b2)(a2 a1^T))``, at a cost of (O + I) R^2 instead of O I R for the dense matrices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from cmlora.errors import CmloraError
from cmlora.lora import TEXT_ENCODERS, LoRA, Update

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


class Side:
    """One LoRA's update of one module, with everything comparisons need of it, found once.

    Args:
        update: whose factors are `up` (O, R) and `down` (R, I), in float64.
    """

    def __init__(self, update: Update) -> None:
        self.up, self.down = update.factors()
        self.outputs = self.up.T @ self.up
        self.inputs = self.down @ self.down.T

    @property
    def shape(self) -> tuple[int, int]:
        """O and I."""
        return self.up.shape[0], self.down.shape[1]

    @cached_property
    def size(self) -> float:
        """Frobenius norm of the update."""
        return float((self.outputs * self.inputs).sum().clamp(min=0).sqrt())

    @cached_property
    def bases(self) -> tuple[Tensor, Tensor]:
        """(R, r) such that ``up @ it``, and ``down.T @ it``, are orthonormal bases."""
        return _whitener(*self._squares), _whitener(*torch.linalg.eigh(self.inputs))

    @property
    def spectrum(self) -> Tensor:
        """Singular values of the update (R), descending.

        The square roots of the eigenvalues of ``(b^T b)^1/2 (a a^T) (b^T b)^1/2``: half as many
        digits as `Update.singular_values`, and far faster for wide layers.
        """
        squares, vectors = self._squares
        root = vectors * squares.clamp(min=0).sqrt()
        energy: Tensor = torch.linalg.eigvalsh(root.T @ self.inputs @ root)
        return energy.flip(0).clamp(min=0).sqrt()

    @cached_property
    def _squares(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.outputs)
        return values, vectors


class Comparison(NamedTuple):
    """N LoRAs beside each other.

    Args:
        tables: see `gram`.
        overlaps: see `overlap`, by pair of indices.
        spectra: singular values by LoRA and module.
    """

    tables: dict[str, Tensor]
    overlaps: dict[tuple[int, int], dict[str, Overlap]]
    spectra: tuple[dict[str, Tensor], ...]


def compare(loras: Sequence[LoRA]) -> Comparison:
    """Everything about LoRAs in one pass, with one module in memory at a time.

    Raises:
        CmloraError: as `gram`.
    """
    tables: dict[str, Tensor] = {}
    pairs = list(combinations(range(len(loras)), 2))
    sums: dict[tuple[int, int], _Sums] = {pair: {} for pair in pairs}
    spectra: tuple[dict[str, Tensor], ...] = tuple({} for _ in loras)
    for module, sides in _sides(loras):
        _add_inner(tables, len(loras), module, sides)
        for i, j in pairs:
            if i in sides and j in sides:
                _add_overlap(sums[i, j], module, sides[i], sides[j])
        for index, side in sides.items():
            spectra[index][module] = side.spectrum
    return Comparison(tables, {pair: _overlaps(own) for pair, own in sums.items()}, spectra)


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
    found: dict[str, Tensor] = {}
    for module, sides in _sides(loras):
        _add_inner(found, len(loras), module, sides)
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

    Raises:
        CmloraError: as `gram`.
    """
    sums: _Sums = {}
    for module, sides in _sides([one, other]):
        if len(sides) == 2:
            _add_overlap(sums, module, *sides.values())
    return _overlaps(sums)


_Sums = dict[str, list[float]]


def _sides(loras: Sequence[LoRA]) -> Iterator[tuple[str, dict[int, Side]]]:
    """Every module of any of the LoRAs, and what those do to it that change it, by index."""
    for module in sorted({module for lora in loras for module in lora.updates}):
        here = {i: lora.updates[module] for i, lora in enumerate(loras) if module in lora.updates}
        sides = {index: Side(update) for index, update in here.items()}
        first, *others = sides
        for index in others:
            if sides[index].shape != sides[first].shape:
                names = f"{loras[first].name} and {loras[index].name}"
                raise CmloraError(
                    f"{module} has different shapes in {names}: they are for different models"
                )
        yield module, sides


def _add_inner(
    tables: dict[str, Tensor], count: int, module: str, sides: Mapping[int, Side]
) -> None:
    table = tables.setdefault(block_of(module), torch.zeros(count, count, dtype=torch.double))
    for i, side in sides.items():
        table[i, i] += (side.outputs * side.inputs).sum()
    for (i, one), (j, other) in combinations(sides.items(), 2):
        table[i, j] += ((one.up.T @ other.up) * (one.down @ other.down.T)).sum()
        table[j, i] = table[i, j]


def _add_overlap(sums: _Sums, module: str, one: Side, other: Side) -> None:
    weight = one.size * other.size
    outputs, chance_out = _shared(one.up, one.bases[0], other.up, other.bases[0])
    inputs, chance_in = _shared(one.down.T, one.bases[1], other.down.T, other.bases[1])
    row = sums.setdefault(block_of(module), [0.0] * 4)
    for place, value in enumerate((1.0, outputs, inputs, max(chance_out, chance_in))):
        row[place] += weight * value


def _overlaps(sums: _Sums) -> dict[str, Overlap]:
    return {
        block: Overlap(*(value / row[0] for value in row[1:]))
        for block, row in sums.items()
        if row[0] > 0
    }


def _shared(
    one: Tensor, whiten: Tensor, other: Tensor, other_whiten: Tensor
) -> tuple[float, float]:
    """|Q1^T Q2|^2 / min(rank) of two column spaces (D, R), and its mean over random subspaces."""
    ranks = whiten.shape[1], other_whiten.shape[1]
    if not min(ranks):
        return 0.0, 0.0
    cosine = whiten.T @ (one.T @ other) @ other_whiten
    share = float(cosine.square().sum()) / min(ranks)
    return min(share, 1.0), max(ranks) / one.shape[0]


def _whitener(values: Tensor, vectors: Tensor) -> Tensor:
    """From the eigenvalues and -vectors of a Gram matrix what makes its columns orthonormal."""
    keep = values > _NOISE * values[-1].clamp(min=1e-300)
    scaled: Tensor = vectors[:, keep] / values[keep].sqrt()
    return scaled
