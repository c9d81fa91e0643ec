"""Which units of two models are kept side by side instead of being merged (PLeaS, step 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmlora.adapters.merging.units import Kind, Units, rows
from cmlora.errors import CmloraError


@dataclass(frozen=True)
class _Block:
    """Units that can be kept: those of layers that become wider without a new configuration.

    Args:
        name: of the block.
        kind: its units.
        cosine: (n) of every matched pair.
        gain: (n) what merging a pair loses, as a share of what the block's units weigh.
        price: numbers that one more unit takes.
    """

    name: str
    kind: Kind
    cosine: Tensor
    gain: Tensor
    price: int


def by_share(
    first: dict[str, Tensor], second: dict[str, Tensor], units: Sequence[Units], share: float
) -> dict[str, Tensor]:
    """The same share of every block's units, worst matches first.

    Args:
        first: weights of one model.
        second: of the other, brought into step.
        units: of both.
        share: from 0 to 1.

    Returns:
        by block, which units are kept, ascending; blocks without any are left out.

    Raises:
        CmloraError: if the share is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise CmloraError(f"separate is {share:g}, expected 0 to 1")
    found = {}
    for block in _blocks(first, second, units):
        keep = round(share * block.kind.size)
        if keep:
            found[block.name] = block.cosine.argsort()[:keep].sort().values
    return found


def by_budget(
    first: dict[str, Tensor], second: dict[str, Tensor], units: Sequence[Units], budget: float
) -> dict[str, Tensor]:
    """The units whose merging would lose most for the numbers that keeping them costs.

    A greedy rule in place of the paper's mixed-integer program. A layer whose axes are widened by
    shares a and b costs (1 + a)(1 + b) - 2 a b times as much; here one axis of a layer is, so that
    every unit of a block costs the same. Costs are numbers, which stand for multiplications per
    token.

    Args:
        first: weights of one model.
        second: of the other, brought into step.
        units: of both.
        budget: numbers of the merged model over those of one, 1 or more.

    Returns:
        see `by_share`.

    Raises:
        CmloraError: if the budget is below 1.
    """
    if not budget >= 1:
        raise CmloraError(f"budget is {budget:g}, expected 1 (nothing is kept apart) or more")
    left = (budget - 1) * sum(t.numel() for t in first.values() if t.is_floating_point())
    blocks = _blocks(first, second, units)
    offers = [
        (float(gain) / block.price, place, unit)
        for place, block in enumerate(blocks)
        for unit, gain in enumerate(block.gain)
        if gain > 0
    ]
    kept: dict[str, list[int]] = {}
    for _, place, unit in sorted(offers, key=lambda offer: (-offer[0], *offer[1:])):
        block = blocks[place]
        if block.price <= left:
            left -= block.price
            kept.setdefault(block.name, []).append(unit)
    return {name: torch.tensor(sorted(own)) for name, own in kept.items()}


def _blocks(
    first: dict[str, Tensor], second: dict[str, Tensor], units: Sequence[Units]
) -> list[_Block]:
    found = []
    for own in units:
        (kind, *more), count = own.kinds, own.count
        if count > 1 or more:
            continue  # heads and normalised groups cannot be added without a new configuration
        product, apart = torch.zeros(2, kind.size, dtype=torch.double)
        sizes = torch.zeros(2, kind.size, dtype=torch.double)
        price = 0
        for place in kind.places:
            a, b = rows(first, place, kind.size), rows(second, place, kind.size)
            product += (a * b).sum(1)
            apart += (a - b).square().sum(1)
            sizes += torch.stack([a.square().sum(1), b.square().sum(1)])
            price += a.shape[1]
        cosine = product / sizes.prod(0).sqrt().clamp(min=1e-300)
        gain = apart / sizes.sum().clamp(min=1e-300)
        found.append(_Block(own.name, kind, cosine, gain, price))
    return found
