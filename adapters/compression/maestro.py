"""One compressed model for every rank: factors trained so that any first few of them are best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cmlora.adapters.compression.form import Factors
from cmlora.adapters.compression.heal import Call
from cmlora.adapters.compression.layers import CompactConv2d, CompactLinear, wrap
from cmlora.adapters.compression.model import put
from cmlora.errors import CmloraError


def factored(model: nn.Module) -> dict[str, CompactLinear | CompactConv2d]:
    """The layers of a model that hold factors, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, CompactLinear | CompactConv2d) and layer.kind == Factors.kind
    }


def cut(model: nn.Module, share: float) -> dict[str, int]:
    """Leave each factored layer the first part of its rank, in place.

    Args:
        model: with layers made by `svd` or `lord`, whose factors come largest first.
        share: of each layer's rank; one is always left.

    Returns:
        The ranks left, by module name.

    Raises:
        CmloraError: if the share is not above 0 and at most 1, or no layer is factored.
    """
    layers = factored(model)
    if not 0 < share <= 1:
        raise CmloraError(f"a share of the rank is above 0 and up to 1, not {share:g}")
    if not layers:
        raise CmloraError("the model has no factored layers")
    ranks = {n: max(1, round(share * len(_field(m, "down")))) for n, m in layers.items()}
    _shorten(model, ranks)
    return ranks


def drop(model: nn.Module, least: float = 1e-5) -> dict[str, int]:
    """Leave out the factors that the group lasso of `nest` has emptied, in place.

    Args:
        model: with factored layers; others stay as they are.
        least: factors from the first b on with ``|U[:, b:]| |V[b:]|`` below this go; one is always
            left.

    Returns:
        The ranks left, by module name, of the layers that lost some.
    """
    ranks = {}
    for name, layer in factored(model).items():
        sizes = [_field(layer, "up").T, _field(layer, "down")]
        tails = [t.detach().double().square().sum(1).flip(0).cumsum(0).flip(0) for t in sizes]
        rank = max(1, int((tails[0] * tails[1] >= least**2).sum()))
        if rank < len(tails[0]):
            ranks[name] = rank
    _shorten(model, ranks)
    return ranks


def nest(
    model: nn.Module,
    original: nn.Module,
    calls: Sequence[Call],
    steps: int = 200,
    rate: float = 1e-4,
    group: float = 0.0,
    seed: int = 0,
) -> tuple[float, ...]:
    """Ordered dropout (Maestro, arXiv:2308.14929) towards the original model's outputs.

    Each step takes one layer and a width b from 1 to its rank, both at random, and lowers the
    error of the model with the first b factors there and all factors elsewhere.

    Args:
        model: with factored layers; changed in place.
        original: what it should answer like.
        calls: taken in turn.
        steps: of Adam.
        rate: of Adam.
        group: weight of the hierarchical group lasso ``sum_b |U[:, b:]| + |V[b:]|``, which empties
            factors from the last one on; see `drop`.
        seed: of layers and widths.

    Returns:
        The relative error before each step, at the width that was drawn.

    Raises:
        CmloraError: if there is no call or no factored layer.
    """
    layers = factored(model)
    if not calls or not layers:
        raise CmloraError("nesting needs calls of the model, and factored layers")
    names = sorted(layers)
    trained = [p for m in layers.values() for n, p in m.named_parameters() if n.startswith("form_")]
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, rate)
    losses = []
    try:
        for step in range(steps):
            call = calls[step % len(calls)]
            name = names[int(torch.randint(len(names), (), generator=generator))]
            rank = len(_field(layers[name], "down"))
            width = 1 + int(torch.randint(rank, (), generator=generator))
            with torch.no_grad():
                wanted = call(original)
            with _narrowed(layers, name, width):
                found = call(model)
            loss = functional.mse_loss(found, wanted) / wanted.square().mean().clamp(min=1e-12)
            losses.append(float(loss.detach()))
            if group:
                loss = loss + group * _tails(layers)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)
    return tuple(losses)


def _shorten(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Leaves layers the first of their factors."""
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        up, down = (_field(layer, side).detach() for side in ("up", "down"))
        put(model, name, wrap(layer, Factors(up[:, :rank], down[:rank])))


class _narrowed:
    """A layer that uses its first factors only, as long as it lasts."""

    def __init__(
        self, layers: Mapping[str, CompactLinear | CompactConv2d], name: str, width: int
    ) -> None:
        self.layer, self.width = layers[name], width

    def __enter__(self) -> None:
        self.layer.width = self.width

    def __exit__(self, *_: object) -> None:
        self.layer.width = None


def _field(layer: nn.Module, name: str) -> Tensor:
    tensor = getattr(layer, f"form_{name}")
    assert isinstance(tensor, Tensor)
    return tensor


def _tails(layers: Mapping[str, nn.Module]) -> Tensor:
    """``sum_b |U[:, b:]| + |V[b:]|`` of all layers."""
    parts = []
    for layer in layers.values():
        for rows in (_field(layer, "up").T, _field(layer, "down")):
            squares = rows.square().sum(1).flip(0).cumsum(0)
            parts.append((squares + 1e-12).sqrt().sum())
    return torch.stack(parts).sum()
