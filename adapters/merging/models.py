"""Two whole models become one: units that match are merged, others are kept side by side.

PLeaS (arXiv:2407.02447): bring the units of both models into step, keep a share of the units that
match worst from either model, and fit every layer to what the layers of both models put out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from cmlora.adapters.calibration import layer_rows
from cmlora.adapters.compression.heal import Call
from cmlora.adapters.compression.layers import fits, matrix_of
from cmlora.adapters.compression.model import put
from cmlora.adapters.merging.rebasin import check_states, match
from cmlora.adapters.merging.units import Units, units_of
from cmlora.adapters.merging.widths import by_budget, by_share
from cmlora.errors import CmloraError

_WIDEST = 4096
"""Inputs of a layer that are fitted at a time: normal equations of more would be too large."""


@dataclass(frozen=True)
class MergedModels:
    """Two models as one.

    Args:
        model: of the class of both; layers between kept units are wider.
        similarity: by block, of the matched units.
        widths: by block, units before and after, of those that became wider.
        residuals: by layer, mean square of what its outputs miss over that of the outputs: with
            the mean of both matrices, and after least squares.
    """

    model: nn.Module
    similarity: dict[str, float]
    widths: dict[str, tuple[int, int]]
    residuals: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class _Axis:
    """Where the entries of an axis come from, and how much of each model is in them.

    Args:
        source: (n) entries of the old axis.
        first: (n) share of the first model: 1/2 where both are merged, 1 and 0 where kept.
        second: (n) of the second one.
    """

    source: Tensor
    first: Tensor
    second: Tensor


def merge_models(
    one: nn.Module,
    other: nn.Module,
    calls: Sequence[Call] = (),
    *,
    separate: float = 0.0,
    budget: float | None = None,
    ridge: float = 1e-6,
    matching: bool = True,
    seed: int = 0,
    widest: int = _WIDEST,
) -> MergedModels:
    """One model that stands for two of the same kind.

    Args:
        one: the model whose units keep their order.
        other: built alike; both are left as they are.
        calls: typical calls for the least squares; without any the weights are averaged.
        separate: share of the units of feed-forward and embedding layers, worst matches first,
            that either model keeps for itself: 0 merges all, 1 keeps all side by side.
        budget: numbers of the result over those of one model; instead of `separate`, the units
            of all layers whose merging would lose most are kept.
        ridge: damping of the least squares, as a share of the mean square of an input.
        matching: bring units into step first; without it they are taken as they are.
        seed: of the matching.
        widest: inputs of a layer that are fitted at a time. Those of wider layers, such as
            convolutions of many channels, are fitted part by part, each to what the others leave;
            every part takes another round of the calls.

    Raises:
        CmloraError: if the models are of different kinds or hold NaN or infinity, or the share is
            not from 0 to 1.
    """
    if separate and budget is not None:
        raise CmloraError("separate and budget both say how many units are kept; give one")
    first, second = dict(one.state_dict()), dict(other.state_dict())
    check_states(first, second)
    units = units_of(one)
    found = match(first, second, units if matching else (), seed)
    second = found.state
    twin = copy.deepcopy(other)
    twin.load_state_dict(second)
    if budget is None:
        kept = by_share(first, second, units, separate)
    else:
        kept = by_budget(first, second, units, budget)
    axes, widths = _axes(units, kept)
    model = copy.deepcopy(one)
    _fill(model, first, second, axes)
    residuals = _fit(model, one, twin, calls, axes, ridge, widest) if calls else {}
    return MergedModels(model, found.similarity, widths, residuals)


def _axes(
    units: Sequence[Units], kept: Mapping[str, Tensor]
) -> tuple[dict[tuple[str, int], _Axis], dict[str, tuple[int, int]]]:
    """The axes that change, by parameter and axis."""
    axes: dict[tuple[str, int], _Axis] = {}
    widths: dict[str, tuple[int, int]] = {}
    for own in units:
        if own.name not in kept:
            continue
        kind, apart = own.kinds[0], kept[own.name]
        keep = len(apart)
        merged = torch.tensor(sorted(set(range(kind.size)) - set(apart.tolist())), dtype=torch.long)
        source = torch.cat([merged, apart, apart])
        half, whole = torch.full((len(merged),), 0.5), torch.ones(keep)
        shares = [torch.cat([half, whole, 0 * whole]), torch.cat([half, 0 * whole, whole])]
        for key, axis in {(place.key, place.axis) for place in kind.places}:
            starts = sorted(p.start for p in kind.places if (p.key, p.axis) == (key, axis))
            axes[key, axis] = _Axis(
                torch.cat([source + start for start in starts]),
                shares[0].repeat(len(starts)),
                shares[1].repeat(len(starts)),
            )
        widths[own.name] = (kind.size, len(source))
    return axes, widths


def _axis(axes: dict[tuple[str, int], _Axis], key: str, axis: int, length: int) -> _Axis:
    half = torch.full((length,), 0.5)
    return axes.get((key, axis), _Axis(torch.arange(length), half, half))


def _fill(
    model: nn.Module,
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    axes: dict[tuple[str, int], _Axis],
) -> None:
    """Puts the mean of both models in, wider where units are kept."""
    state: dict[str, Tensor] = {}
    for key, tensor in first.items():
        if not tensor.is_floating_point():
            state[key] = tensor
            continue
        if not tensor.ndim:
            state[key] = (tensor + second[key]) / 2
            continue
        out = _axis(axes, key, 0, tensor.shape[0])
        total = torch.zeros(())
        for side, share in ((first[key], out.first), (second[key], out.second)):
            part = side.float()[out.source] * share.reshape(-1, *[1] * (side.ndim - 1))
            if (key, 1) in axes:
                read = axes[key, 1]
                seen = read.first if side is first[key] else read.second
                # A unit that is kept is read by its own model's half of what is merged.
                part = part[:, read.source] * (seen > 0)
            total = total + part
        state[key] = total.to(tensor.dtype)
    for name, layer in list(model.named_modules()):
        weight = f"{name}.weight"
        if isinstance(layer, nn.Linear) and state[weight].shape != layer.weight.shape:
            rows_out, columns = state[weight].shape
            wider = nn.Linear(columns, rows_out, layer.bias is not None, dtype=layer.weight.dtype)
            put(model, name, wider.to(layer.weight.device))
    model.load_state_dict(state)


@torch.no_grad()
def _fit(
    model: nn.Module,
    one: nn.Module,
    other: nn.Module,
    calls: Sequence[Call],
    axes: dict[tuple[str, int], _Axis],
    ridge: float,
    widest: int,
) -> dict[str, tuple[float, float]]:
    """Least squares for every layer: inputs and outputs are the means of both models'."""
    left = {name: layer for name, layer in model.named_modules() if fits(layer)}
    residuals: dict[str, tuple[float, float]] = {}
    start = 0
    while left:
        part = slice(start, start + widest)
        sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for call in calls:
            seen = [_watched(side, call, left) for side in (one, other)]
            for name in seen[0].keys() & seen[1].keys():
                (x, y), (x_other, y_other) = seen[0][name], seen[1][name]
                weight = f"{name}.weight"
                read, out = _axis(axes, weight, 1, x.shape[1]), _axis(axes, weight, 0, y.shape[1])
                inputs, wanted = _blend(x, x_other, read), _blend(y, y_other, out)
                matrix = _matrix(left[name])
                if matrix.shape[1] > inputs.shape[1]:
                    inputs = torch.cat([inputs, torch.ones(len(inputs), 1).double()], 1)
                missed, own = wanted - inputs @ matrix.T, inputs[:, part]
                new = own.T @ own, missed.T @ own, _squares(missed, wanted)
                old = sums.get(name)
                if old is not None:
                    new = old[0] + new[0], old[1] + new[1], old[2] + new[2]
                sums[name] = new
        for name, (square, mixed, (lost, size)) in sums.items():
            step = _step(square, mixed, ridge)
            _move(left[name], step, start)
            after = float(lost + ((step @ square) * step).sum() - 2 * (step * mixed).sum())
            size = max(float(size), 1e-300)
            before = residuals.get(name, (float(lost) / size, 0.0))[0]
            residuals[name] = before, max(after, 0.0) / size
        start += widest
        left = {name: left[name] for name in sums if _matrix(left[name]).shape[1] > start}
    return residuals


def _squares(*tables: Tensor) -> Tensor:
    return torch.stack([table.square().sum() for table in tables])


def _matrix(layer: nn.Module) -> Tensor:
    """(O, I), or (O, I + 1) with the bias last, in float64."""
    weight = matrix_of(layer).double()
    bias = cast("Tensor | None", layer.bias)
    return weight if bias is None else torch.cat([weight, bias.detach().double()[:, None]], 1)


def _step(square: Tensor, mixed: Tensor, ridge: float) -> Tensor:
    """The change of a matrix that explains most of what it misses, the nearest if many do."""
    damping = max(ridge, 1e-12) * float(square.diagonal().mean()) + 1e-300
    damped = square + damping * torch.eye(len(square), dtype=torch.double)
    found: Tensor = torch.linalg.solve(damped, mixed.T).T
    return found


def _move(layer: nn.Module, step: Tensor, start: int) -> None:
    """Adds to some columns of a layer's matrix, see `_matrix`."""
    matrix = _matrix(layer)
    matrix[:, start : start + step.shape[1]] += step
    weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
    columns = weight.flatten(1).shape[1]
    weight.data.copy_(matrix[:, :columns].reshape(weight.shape))
    if bias is not None:
        bias.data.copy_(matrix[:, columns])


def _blend(x: Tensor, y: Tensor, axis: _Axis) -> Tensor:
    """Rows of both models, merged or kept as the axis says."""
    return x[:, axis.source] * axis.first.double() + y[:, axis.source] * axis.second.double()


def _watched(
    model: nn.Module, call: Call, names: dict[str, nn.Module]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs (n, I) and outputs (n, O) of every layer in one call."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = []
    for name, layer in model.named_modules():
        if name not in names:
            continue

        def keep(
            own: nn.Module, given: tuple[Tensor, ...], output: Tensor, name: str = name
        ) -> None:
            wanted = output.movedim(1, -1) if isinstance(own, nn.Conv2d) else output
            flat = wanted.double().reshape(-1, wanted.shape[-1])
            seen.setdefault(name, []).append((layer_rows(own, given[0]), flat))

        handles.append(layer.register_forward_hook(keep))
    try:
        with torch.no_grad():
            call(model)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: (torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))
        for name, pairs in seen.items()
    }
