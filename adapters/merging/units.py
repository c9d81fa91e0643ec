"""The inner units of an image model: what may be reordered without changing what it computes.

Two models may use different units for the same thing. Only units whose order nobody outside a block
sees can be brought into step: the hidden units of feed-forward and time-embedding layers, whole
heads of attention and the dimensions inside a head, and the inner channels of residual blocks in
whole groups of their normalisation. A stream that blocks add to has one order for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]
"""Parameters by name."""


class Place(NamedTuple):
    """Where units are: along an axis of a parameter, from an entry on.

    Args:
        key: the parameter's name.
        axis: 0 where units are written, 1 where they are read.
        start: entry of the first unit.
    """

    key: str
    axis: int = 0
    start: int = 0


@dataclass(frozen=True)
class Kind:
    """Units of the same sort.

    Args:
        size: how many there are in each set.
        places: where they are.
        fixed: their order inside a set must stay.
    """

    size: int
    places: tuple[Place, ...]
    fixed: bool = False


@dataclass(frozen=True)
class Units:
    """Sets of units whose order is free, and inside of which the order is free.

    Args:
        name: of the block.
        count: how many sets: heads, or groups of channels; 1 where there is nothing like that.
        kinds: what a set is made of; all kinds move together when sets change places.
    """

    name: str
    count: int
    kinds: tuple[Kind, ...]


class Order(NamedTuple):
    """An order of units.

    Args:
        sets: (count) which set comes to each place.
        inside: by kind (count, size): which unit of that set comes to each place.
    """

    sets: Tensor
    inside: tuple[Tensor, ...]

    def flat(self, kind: int) -> Tensor:
        """(count * size): which unit comes to each place, counted over all sets."""
        inner = self.inside[kind]
        return (self.sets[:, None] * inner.shape[1] + inner).flatten()


def identity(units: Units) -> Order:
    """The order in which units are."""
    inside = tuple(torch.arange(kind.size).expand(units.count, -1) for kind in units.kinds)
    return Order(torch.arange(units.count), inside)


def shuffled(units: Units, generator: torch.Generator) -> Order:
    """Any order that is allowed."""
    inside = []
    for kind in units.kinds:
        rows = [torch.randperm(kind.size, generator=generator) for _ in range(units.count)]
        whole = torch.arange(kind.size).expand(units.count, -1)
        inside.append(whole if kind.fixed else torch.stack(rows))
    return Order(torch.randperm(units.count, generator=generator), tuple(inside))


def reorder(state: State, units: Units, order: Order) -> dict[str, Tensor]:
    """The same model with its units in another order."""
    changed = dict(state)
    for index, kind in enumerate(units.kinds):
        places = order.flat(index)
        for key, axis, start in kind.places:
            tensor = changed[key]
            everything = torch.arange(tensor.shape[axis])
            everything[start : start + len(places)] = start + places
            changed[key] = tensor.index_select(axis, everything.to(tensor.device))
    return changed


def rows(state: State, place: Place, length: int) -> Tensor:
    """(units, numbers): everything that belongs to each unit at one place."""
    tensor = state[place.key].detach().double().movedim(place.axis, 0)
    return tensor[place.start : place.start + length].reshape(length, -1)


def units_of(model: nn.Module) -> tuple[Units, ...]:
    """All units of a UNet, diffusion transformer or CLIP text encoder whose order is free."""
    names = [name for name, _ in model.named_modules()]
    turned = any(part in name.lower() for name in names for part in ("rope", "rotary"))
    known = {name for name, _ in model.named_parameters()}
    found = []
    for name, module in model.named_modules():
        for units in _inside(name, module, turned):
            kinds = tuple(
                Kind(k.size, tuple(p for p in k.places if p.key in known), k.fixed)
                for k in units.kinds
            )
            found.append(Units(units.name, units.count, kinds))
    return tuple(found)


def _inside(name: str, module: Any, turned: bool) -> Iterator[Units]:
    dot = f"{name}." if name else ""
    if _linear(module, "fc1", "fc2"):
        yield _hidden(name, f"{dot}fc1", f"{dot}fc2", module.fc2.in_features)
    elif _linear(module, "linear_1", "linear_2"):
        if module.linear_1.out_features == module.linear_2.in_features:
            yield _hidden(name, f"{dot}linear_1", f"{dot}linear_2", module.linear_2.in_features)
    elif _feeds_forward(module):
        width = module.net[2].in_features
        halves = module.net[0].proj.out_features // width
        yield _hidden(name, f"{dot}net.0.proj", f"{dot}net.2", width, halves)
    elif _linear(module, "to_q", "to_k", "to_v") and hasattr(module, "heads"):
        if getattr(module, "add_k_proj", None) is None and getattr(module, "to_out", None):
            bound = turned or getattr(module, "norm_q", None) is not None
            names = [f"{dot}{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
            yield from _attention(name, module.to_q, module.to_k, module.heads, names, bound)
    elif _linear(module, "q_proj", "k_proj", "v_proj", "out_proj"):
        heads = getattr(module, "num_heads", 0)
        names = [f"{dot}{part}_proj" for part in ("q", "k", "v", "out")]
        yield from _attention(name, module.q_proj, module.k_proj, heads, names, turned)
    elif isinstance(getattr(module, "norm2", None), nn.GroupNorm) and hasattr(module, "conv2"):
        yield _residual(name, dot, module)


def _linear(module: Any, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in names)


def _feeds_forward(module: Any) -> bool:
    net = getattr(module, "net", None)
    return (
        isinstance(net, nn.ModuleList)
        and len(net) > 2
        and isinstance(getattr(net[0], "proj", None), nn.Linear)
        and isinstance(net[2], nn.Linear)
    )


def _hidden(name: str, into: str, out: str, width: int, halves: int = 1) -> Units:
    """Units between two linear layers; the first may make a gate for each of them too."""
    places = [Place(f"{out}.weight", 1)]
    for half in range(halves):
        places += [Place(f"{into}.{kind}", 0, half * width) for kind in ("weight", "bias")]
    return Units(name, 1, (Kind(width, tuple(places)),))


def _attention(
    name: str, q: nn.Linear, k: nn.Linear, heads: int, names: Sequence[str], bound: bool
) -> Iterator[Units]:
    """Heads; inside each the dimensions of queries and keys, and apart from those of values."""
    if not heads or q.out_features != k.out_features or q.out_features % heads:
        return
    size = q.out_features // heads
    written = [[Place(f"{n}.weight"), Place(f"{n}.bias")] for n in names[:3]]
    values = (*written[2], Place(f"{names[3]}.weight", 1))
    yield Units(name, heads, (Kind(size, (*written[0], *written[1]), bound), Kind(size, values)))


def _residual(name: str, dot: str, module: Any) -> Units:
    """Channels between the convolutions, in whole groups of the norm between them."""
    channels, groups = module.norm2.num_channels, module.norm2.num_groups
    places = [Place(f"{dot}conv2.weight", 1)]
    places += [Place(f"{dot}{part}.{k}") for part in ("conv1", "norm2") for k in ("weight", "bias")]
    time = getattr(module, "time_emb_proj", None)
    for half in range(0 if time is None else time.out_features // channels):
        places += [Place(f"{dot}time_emb_proj.{k}", 0, half * channels) for k in ("weight", "bias")]
    return Units(name, groups, (Kind(channels // groups, tuple(places)),))
