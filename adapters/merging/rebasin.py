"""Two models brought into step: weight matching, and its version that follows a loss.

Git Re-Basin (arXiv:2209.04836) permutes the units of one model so that its weights are nearest to
the other's. Singular values stay as they are: what comes together are the large singular directions
(arXiv:2402.04051).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmlora.adapters.finite import check_finite
from cmlora.adapters.merging.align import assign
from cmlora.adapters.merging.units import (
    Order,
    State,
    Units,
    identity,
    reorder,
    rows,
)
from cmlora.errors import CmloraError

_SWEEPS, _GAIN = 100, 1e-12


@dataclass(frozen=True)
class Matched:
    """A model with its units in the order of another's.

    Args:
        state: its parameters.
        orders: by name of the units; of the model as it was.
        similarity: by name of the units, the inner product of what was matched over the norms.
        losses: that were tried, where a loss was followed.
    """

    state: dict[str, Tensor]
    orders: dict[str, Order]
    similarity: dict[str, float]
    losses: tuple[float, ...] = ()


def match(reference: State, other: State, units: Sequence[Units], seed: int = 0) -> Matched:
    """The other model in the order in which its weights are nearest to the reference's.

    Block by block the best order is found exactly, all others standing; sets of units are compared
    at their own best inner orders. This goes round until nothing improves.

    Args:
        reference: parameters by name.
        other: the same names and shapes.
        units: see `cmlora.adapters.merging.units.units_of`.
        seed: of the order in which blocks are visited.

    Raises:
        CmloraError: if the models differ in more than values, or hold NaN or infinity.
    """
    check_states(reference, other)
    generator = torch.Generator().manual_seed(seed)
    state = dict(other)
    orders = {own.name: identity(own) for own in units}
    for _ in range(_SWEEPS):
        improved = False
        for index in torch.randperm(len(units), generator=generator).tolist():
            own = units[index]
            order, gain = best_order(reference, state, own)
            if gain > _GAIN:
                state = reorder(state, own, order)
                orders[own.name] = combined(orders[own.name], order)
                improved = True
        if not improved:
            break
    return Matched(state, orders, {own.name: similarity(reference, state, own) for own in units})


def best_order(reference: State, state: State, units: Units) -> tuple[Order, float]:
    """The order of largest inner product, and what it gains relative to the norms."""
    tables = [_products(reference, state, units, kind) for kind in range(len(units.kinds))]
    count = units.count
    scores = torch.zeros(count, count, dtype=torch.double)
    choices: list[list[list[Tensor]]] = []
    for kind, table in zip(units.kinds, tables, strict=True):
        blocks = table.reshape(count, kind.size, count, kind.size).permute(0, 2, 1, 3)
        rows_of = []
        for i in range(count):
            row = []
            for j in range(count):
                inner = (
                    torch.arange(kind.size)
                    if kind.fixed
                    else torch.tensor(assign(blocks[i, j]), dtype=torch.long)
                )
                scores[i, j] += blocks[i, j].gather(1, inner[:, None]).sum()
                row.append(inner)
            rows_of.append(row)
        choices.append(rows_of)
    sets = torch.tensor(assign(scores), dtype=torch.long)
    inside = tuple(
        torch.stack([row[int(j)] for row, j in zip(rows_of, sets, strict=True)])
        for rows_of in choices
    )
    order = Order(sets, inside)
    now = sum(float(table.diagonal().sum()) for table in tables)
    new = float(scores.gather(1, sets[:, None]).sum())
    return order, (new - now) / max(_norms(reference, state, units), 1e-300)


def combined(first: Order, then: Order) -> Order:
    """The order that both make, one after the other."""
    inside = tuple(
        one[then.sets].gather(1, two) for one, two in zip(first.inside, then.inside, strict=True)
    )
    return Order(first.sets[then.sets], inside)


def similarity(reference: State, state: State, units: Units) -> float:
    """Inner product of everything that belongs to the units over the norms, -1 to 1."""
    tables = [_products(reference, state, units, kind) for kind in range(len(units.kinds))]
    inner = sum(float(table.diagonal().sum()) for table in tables)
    return inner / max(_norms(reference, state, units), 1e-300)


def straight_through(
    reference: State,
    other: State,
    units: Sequence[Units],
    loss: Callable[[Mapping[str, Tensor]], Tensor],
    *,
    steps: int = 50,
    rate: float = 1e-2,
    on_step: Callable[[], None] = lambda: None,
) -> Matched:
    """The order whose midpoint with the reference has the least loss (the paper's STE).

    A free copy of the reference is matched with the other model; the loss of the midpoint of the
    reference and the reordered model is followed by SGD as if its gradient were the copy's.

    Args:
        reference: parameters by name.
        other: the same names and shapes.
        units: see `cmlora.adapters.merging.units.units_of`.
        loss: of a model's parameters.
        steps: of SGD with momentum 0.9.
        rate: of learning.
        on_step: called after every step.

    Raises:
        CmloraError: if the models differ in more than values, hold NaN or infinity, or there is no
            step.
    """
    check_states(reference, other)
    if steps < 1:
        raise CmloraError(f"learning takes 1 step or more, not {steps}")
    keys = sorted({place.key for own in units for kind in own.kinds for place in kind.places})
    free = {key: reference[key].detach().clone().requires_grad_(True) for key in keys}
    optimizer = torch.optim.SGD(free.values(), lr=rate, momentum=0.9)
    best, least, losses = match(reference, other, units), float("inf"), []
    for _ in range(steps):
        found = match({**reference, **free}, other, units)
        middle = {
            key: torch.lerp(tensor, found.state[key], 0.5) if tensor.is_floating_point() else tensor
            for key, tensor in reference.items()
        }
        for key, tensor in free.items():
            middle[key] = middle[key] + (tensor - tensor.detach()) / 2
        value = loss(middle)
        losses.append(float(value.detach()))
        if losses[-1] < least:
            best, least = found, losses[-1]
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
        on_step()
    nearness = {own.name: similarity(reference, best.state, own) for own in units}
    return Matched(best.state, best.orders, nearness, tuple(losses))


def check_states(
    reference: State,
    other: State,
    names: tuple[object, object] = ("the first model", "the second model"),
) -> None:
    """Raises `CmloraError` unless both have the same parameters and shapes, and finite values."""
    if reference.keys() != other.keys():
        odd = sorted(reference.keys() ^ other.keys())[0]
        raise CmloraError(f"only one of the models has {odd}: they are of different kinds")
    for key, tensor in reference.items():
        if tensor.shape != other[key].shape:
            shapes = f"{tuple(tensor.shape)} and {tuple(other[key].shape)}"
            raise CmloraError(f"{key} is {shapes}: these models are of different kinds")
    for state, name in zip((reference, other), names, strict=True):
        check_finite(state, name)


def _products(reference: State, state: State, units: Units, kind: int) -> Tensor:
    """(N, N) inner products of the reference's units with the other's."""
    own = units.kinds[kind]
    length = units.count * own.size
    table = torch.zeros(length, length, dtype=torch.double)
    for place in own.places:
        table += rows(reference, place, length) @ rows(state, place, length).T
    return table


def _norms(reference: State, state: State, units: Units) -> float:
    sizes = [0.0, 0.0]
    for kind in units.kinds:
        for place in kind.places:
            for index, side in enumerate((reference, state)):
                own = rows(side, place, units.count * kind.size)
                sizes[index] += float(own.square().sum())
    return math.sqrt(sizes[0] * sizes[1])
