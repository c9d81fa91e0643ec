"""A whole denoiser in compact forms, layer by layer, and back from disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cmlora import container
from cmlora.adapters.compression.form import (
    Form,
    Method,
    check_keep,
    dense,
    from_tensors,
    in_precision,
    nbytes,
    root,
)
from cmlora.adapters.compression.knapsack import forms
from cmlora.adapters.compression.layers import (
    CompactConv2d,
    CompactLinear,
    fits,
    matrix_of,
    wrap,
)
from cmlora.adapters.compression.rule import Cost, Rule
from cmlora.adapters.finite import check_finite
from cmlora.errors import CmloraError

_HEADER = "cmlora.compact"


class Saved(NamedTuple):
    """What happened to one layer.

    Args:
        before: bytes of its matrix, in the precision it is to be stored in.
        after: bytes of what is stored instead, indices included.
        error: of its outputs on the calibration inputs, relative; of the matrix without them.
    """

    before: int
    after: int
    error: float


@dataclass(frozen=True)
class Compressed:
    """What became of a model.

    Args:
        layers: by module name, those in a compact form.
        kept: names of those left as they were: no form would have been smaller.
        before: bytes of all parameters and buffers before.
        after: the same now.
    """

    layers: dict[str, Saved]
    kept: tuple[str, ...]
    before: int
    after: int


def compress(
    model: nn.Module,
    method: Method,
    keep: float,
    grams: Mapping[str, Tensor] | None = None,
    least: int = 16,
    rule: Rule | Literal["knapsack"] | None = None,
    dtype: torch.dtype | None = None,
) -> Compressed:
    """Put every linear layer and convolution of a model into a compact form, in place.

    Args:
        model: any; layers inside others are found by name.
        method: an entry of `cmlora.adapters.compression.COMPRESSIONS`.
        keep: share of each matrix's bytes; of all of them if there is a rule.
        grams: see `cmlora.adapters.calibration.grams`; layers without one count all
            inputs alike.
        least: layers with fewer inputs or outputs stay as they are.
        rule: spreads the share over the layers by their spectra, ``welore`` or ``budget`` of
            `cmlora.adapters.compression.RULES`; or ``knapsack``, which tries several shares of
            every layer with the method itself and takes the best that fit. Evenly if not given.
        dtype: that the model will be stored in: masks and scales stay as large as they are when
            numbers become half as large. Its own if not given; the layers keep theirs.

    Raises:
        CmloraError: if the share is not above 0 and at most 1, no layer becomes smaller, or the
            model or what is known of its inputs holds NaN or infinity.
    """
    check_keep(keep)
    check_finite(model.state_dict(), type(model).__name__)
    check_finite(grams or {}, "the moments of the inputs")
    before, kept, layers = model_bytes(model), [], {}
    moments = grams or {}
    large = {
        name: layer
        for name, layer in model.named_modules()
        if fits(layer) and min(matrix_of(layer).shape) >= least
    }
    chosen: dict[str, Form | None] = {}
    shares: dict[str, float] = {}
    if isinstance(rule, str):
        matrices = {name: _stored(layer, dtype) for name, layer in large.items()}
        chosen = forms(matrices, method, keep, moments, relative_error)
    elif rule is None:
        shares = dict.fromkeys(large, keep)
    else:
        shares = spread(large, rule, keep, moments)
    for name, layer in [pair for pair in model.named_modules() if fits(pair[1])]:
        matrix, stored = matrix_of(layer), _stored(layer, dtype)
        gram = moments.get(name)
        form = chosen.get(name)
        if shares.get(name, 1.0) < 1:
            form = method(stored, shares[name], gram)
        size = stored.numel() * stored.element_size()
        if form is None or nbytes(form) >= size:
            kept.append(name)
            continue
        live = in_precision(form, matrix.dtype)
        error = relative_error(matrix, dense(live), gram)
        layers[name] = Saved(size, nbytes(form), error)
        put(model, name, wrap(layer, live))
    if not layers:
        raise CmloraError(f"no layer of {type(model).__name__} becomes smaller at {keep:g}")
    return Compressed(layers, tuple(kept), before, model_bytes(model))


def spread(
    layers: Mapping[str, nn.Module], rule: Rule, keep: float, grams: Mapping[str, Tensor]
) -> dict[str, float]:
    """The share of each layer's bytes that a rule for spectra gives it; 1 to stay as it is."""
    spectra, costs = {}, {}
    for name, layer in layers.items():
        matrix = matrix_of(layer).double()
        outputs, inputs = matrix.shape
        values: Tensor = torch.linalg.svdvals(matrix @ root(grams.get(name), inputs))
        # The error of a layer counts relative to what it puts out, as layers differ in size.
        spectra[name] = values / values.norm().clamp(min=1e-300)
        costs[name] = Cost(outputs + inputs, outputs * inputs)
    ranks = {name: len(values) for name, values in rule(spectra, costs, keep).items()}
    return {name: costs[name].of(rank) / costs[name].whole for name, rank in ranks.items()}


def _stored(layer: nn.Module, dtype: torch.dtype | None) -> Tensor:
    return matrix_of(layer) if dtype is None else matrix_of(layer).to(dtype)


def relative_error(matrix: Tensor, other: Tensor, gram: Tensor | None = None) -> float:
    """``|X (A - B)^T| / |X A^T|`` for inputs X with this gram; all inputs alike without one."""

    def size(m: Tensor) -> float:
        if gram is None:
            return float(m.square().sum())
        blocks = gram.double() if gram.ndim == 3 else gram.double()[None]
        parts = m.reshape(len(m), len(blocks), -1)
        return float(torch.einsum("obg,bgh,obh->", parts, blocks, parts))

    whole = size(matrix.double())
    lost = max(size(matrix.double() - other.double()), 0.0)
    return math.sqrt(lost / whole) if whole > 0 else 0.0


def model_bytes(model: nn.Module) -> int:
    """Bytes of everything a model stores."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one with this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model with compact layers; `load` puts it back into a model of the same kind.

    Raises:
        CmloraError: if the place cannot be written to.
    """
    kinds = {
        name: layer.kind
        for name, layer in model.named_modules()
        if isinstance(layer, CompactLinear | CompactConv2d)
    }
    container.save(path, model.state_dict(), {_HEADER: json.dumps(kinds, sort_keys=True)})


def load(model: nn.Module, path: str | Path) -> None:
    """Put what `save` wrote into a model that is built like the one it came from, in place.

    Raises:
        CmloraError: if the file is not one of `save`, or is for another model; the model may then
            be half changed.
    """
    try:
        kinds = json.loads(container.header(path).metadata.get(_HEADER, ""))
    except ValueError:
        raise CmloraError(f"{path} is not a compressed model") from None
    tensors: dict[str, Tensor] = load_file(path)
    for name, kind in kinds.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise CmloraError(f"{path} has a layer {name} that the model has not") from None
        start = f"{name}.form_"
        own = {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
        outputs, inputs = matrix_of(layer).shape
        put(model, name, wrap(layer, from_tensors(kind, own, (outputs, inputs))))
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    if missing or unexpected:
        raise CmloraError(f"{path} is for another model: {', '.join([*missing, *unexpected][:3])}")
