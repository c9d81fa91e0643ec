"""What the layers of a model are fed, measured once and kept: all that data-aware methods need.

Every layer is described by the second moments of its inputs, their mean, and for the projections of
attention by a few inputs with the outputs they get. One file holds this for the base model and for
the base model with each LoRA active; merging, compression and analysis read the same file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cmlora import container
from cmlora.adapters.compression.layers import fits
from cmlora.errors import CmloraError

BASE = ""
"""Stands for the model without any LoRA where the names of LoRAs are keys."""

_WIDEST = 2048
_ROWS = 256
_KEY = "cmlora.calibration"


class Seen(NamedTuple):
    """What one layer was fed.

    Args:
        gram: mean of x x^T, (I, I); (I, g, g) with the kernel's g = kh * kw places for
            convolutions of more than 2048 inputs, whose channels are then taken as unrelated.
        mean: of x, (I).
        inputs: some x of one picture, (L, I), for layers that were sampled.
        outputs: what the layer made of them, (L, O).
    """

    gram: Tensor
    mean: Tensor
    inputs: Tensor | None = None
    outputs: Tensor | None = None


@dataclass(frozen=True)
class Calibration:
    """What the layers of a model were fed, without LoRAs and with each of them.

    Args:
        seen: by LoRA name, `BASE` for none, and module with the pipeline's component in front.
        hashes: SHA-256 of the LoRAs' files, by name.
        about: how it was measured: model, prompts, steps, seeds, heads of the attention modules.
    """

    seen: Mapping[str, Mapping[str, Seen]]
    hashes: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def grams(self, name: str = BASE, component: str = "") -> dict[str, Tensor]:
        """Second moments by module; of one component alone, without its name, if it is given."""
        start = f"{component}." if component else ""
        return {
            module.removeprefix(start): seen.gram.double()
            for module, seen in self.seen.get(name, {}).items()
            if module.startswith(start)
        }

    def name_of(self, name: str, sha256: str = "") -> str:
        """What a LoRA is called here: by its file's hash, otherwise by its name.

        Raises:
            CmloraError: if it was not measured.
        """
        same = [own for own, digest in self.hashes.items() if sha256 and digest == sha256]
        if same:
            return same[0]
        if name in self.seen and not (sha256 and self.hashes.get(name)):
            return name
        known = ", ".join(own for own in self.seen if own != BASE) or "no LoRA"
        raise CmloraError(
            f"the calibration data is not about {name}; it knows {known}: "
            "measure this one with cmlora calib"
        )


def save(found: Calibration, path: str | PathLike[str]) -> None:
    """Writes calibration data as safetensors in single precision; equal tables are kept once."""
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    names = list(found.seen)
    for index, name in enumerate(names):
        for module, seen in sorted(found.seen[name].items()):
            for kind, tensor in seen._asdict().items():
                if tensor is None:
                    continue
                key, stored = f"{index}/{module}/{kind}", tensor.float()
                # Queries, keys and values of self-attention are made from the same inputs.
                twin = next(
                    (
                        other
                        for other in _siblings(key)
                        if other in tensors and torch.equal(tensors[other], stored)
                    ),
                    None,
                )
                if twin is None:
                    tensors[key] = stored
                else:
                    same[key] = twin
    about = {"names": names, "same": same, "hashes": dict(found.hashes), "about": dict(found.about)}
    container.save(path, tensors, {"format": "pt", _KEY: json.dumps(about, sort_keys=True)})


def load(path: str | PathLike[str]) -> Calibration:
    """Reads what `save` wrote.

    Raises:
        CmloraError: if the file is no calibration data, or damaged.
    """
    text = container.header(path).metadata.get(_KEY)
    if text is None:
        raise CmloraError(f"{path} is no calibration data; cmlora calib writes it")
    tensors, _ = container.content(path)
    try:
        facts = json.loads(text)
        every = {**tensors, **{key: tensors[twin] for key, twin in facts["same"].items()}}
        tables: dict[str, dict[str, dict[str, Tensor]]] = {name: {} for name in facts["names"]}
        for key, tensor in every.items():
            index, module, kind = key.split("/")
            tables[facts["names"][int(index)]].setdefault(module, {})[kind] = tensor
        seen = {
            name: {module: Seen(**kinds) for module, kinds in table.items()}
            for name, table in tables.items()
        }
        return Calibration(seen, facts["hashes"], facts["about"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise CmloraError(f"{path}: the calibration data is damaged") from None


class Watch:
    """Sums up what layers are fed, between `watching` and the end of its block."""

    def __init__(self, sampled: Iterable[str], at: int) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor, int]] = {}
        self._sampled, self._at = frozenset(sampled), at
        self._calls: dict[str, int] = {}
        self._rows: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, name: str, layer: nn.Module, inputs: Tensor, output: Tensor) -> None:
        """One call of a layer."""
        rows = layer_rows(layer, inputs.detach())
        if isinstance(layer, nn.Conv2d) and rows.shape[1] > _WIDEST:
            parts = rows.reshape(len(rows), layer.in_channels, -1)
            moments = torch.einsum("nig,nih->igh", parts, parts)
        else:
            moments = rows.T @ rows
        moments, total, count = moments.cpu(), rows.sum(0).cpu(), len(rows)
        if name in self._sums:
            before = self._sums[name]
            moments, total, count = before[0] + moments, before[1] + total, before[2] + count
        self._sums[name] = moments, total, count
        call = self._calls[name] = self._calls.get(name, 0) + 1
        if name in self._sampled and call == self._at:
            # The last of a batch is the one with the prompt, where there is guidance.
            tokens = inputs.detach()[-1].float().cpu(), output.detach()[-1].float().cpu()
            places = torch.linspace(0, len(tokens[0]) - 1, min(len(tokens[0]), _ROWS)).long()
            self._rows[name] = tokens[0][places], tokens[1][places]

    def seen(self) -> dict[str, Seen]:
        """What was found, by module name; layers that were not called are missing."""
        return {
            name: Seen(moments / count, total / count, *self._rows.get(name, (None, None)))
            for name, (moments, total, count) in self._sums.items()
        }


@contextmanager
def watching(
    model: nn.Module,
    only: Iterable[str] | None = None,
    sampled: Iterable[str] = (),
    at: int = 1,
) -> Iterator[Watch]:
    """Watches the layers of a model; the hooks come off whatever happens.

    Args:
        model: with or without injected LoRAs, which are looked through.
        only: names of the layers; all that fit if not given.
        sampled: names of linear layers of which some inputs and outputs are kept.
        at: of the call with this number, from 1 on.
    """
    wanted = None if only is None else frozenset(only)
    watch = Watch(sampled, at)

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda layer, inputs, output: watch.add(name, layer, inputs[0], output)

    handles = [
        layer.register_forward_hook(hook(name))
        for name, layer in base_layers(model)
        if fits(layer) and (wanted is None or name in wanted)
    ]
    try:
        with torch.no_grad():
            yield watch
    finally:
        for handle in handles:
            handle.remove()


def grams(model: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """Mean second moments of the inputs of every layer, over whatever ``run`` does.

    Args:
        model: watched while ``run`` is called.
        run: calls the model on typical inputs.

    Returns:
        By module name, in float64, see `Seen`. Layers that were not called are missing.
    """
    with watching(model) as watch:
        run()
    return {name: seen.gram for name, seen in watch.seen().items()}


def base_layers(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The model's own layers by the names they had before LoRAs were injected."""
    inner: Any = getattr(model, "get_base_layer", None)
    if inner is not None:
        yield name, inner()
        return
    children = list(model.named_children())
    if not children:
        yield name, model
    for child, module in children:
        yield from base_layers(module, f"{name}.{child}" if name else child)


def _siblings(key: str) -> list[str]:
    """The keys of other projections that may have had the same inputs."""
    head, _, last = key.rpartition("/")
    parent, _, own = head.rpartition(".")
    others = ("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj")
    return [f"{parent}.{other}/{last}" for other in others if other != own] if own in others else []


def layer_rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """(n, I) in float64: one row for every place the layer's matrix is applied to."""
    if not isinstance(layer, nn.Conv2d):
        return inputs.double().reshape(-1, inputs.shape[-1])
    assert not isinstance(layer.padding, str)
    patches = functional.unfold(
        inputs.double(), layer.kernel_size, layer.dilation, layer.padding, layer.stride
    )
    return patches.transpose(1, 2).flatten(0, 1)
