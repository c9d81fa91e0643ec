"""Switching between LoRAs that PEFT has injected, fast enough for the denoising loop."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cmlora.errors import CmloraError
from cmlora.fusing import FusedWeight, check_resident, fusable
from cmlora.gating import Forward, decides, gateable, gated
from cmlora.plan import Gate, Strength

_MISSING: Any = object()
_REMEMBERED = 256
_GATED = 1  # each holds the factors of all its LoRAs once more


_ATTRIBUTES = ("_active_adapter", "_disable_adapters")


@dataclass(frozen=True)
class Snapshot:
    """The adapter state of a module: what `AdapterSwitch.restore` puts back.

    Args:
        attributes: per layer, the attributes of the instance that say which LoRAs are active.
        scaling: per layer, the scale of every LoRA.
        requires_grad: of every LoRA parameter.
    """

    attributes: tuple[Mapping[str, Any], ...]
    scaling: tuple[Mapping[str, Any], ...]
    requires_grad: tuple[tuple[nn.Parameter, bool], ...]


class _Activation(NamedTuple):
    """What one layer gets when a set of weights is activated."""

    layer: Any
    attributes: dict[str, Any]
    names: list[str]
    scaling: dict[str, Any]
    scales: dict[str, Any]
    beside: bool


class _Activations(NamedTuple):
    """What all layers get, the weights that are exchanged, and the forwards that stand in."""

    layers: list[_Activation]
    exchanged: list[tuple[FusedWeight, Tensor]]
    forwards: list[tuple[dict[str, Any], Forward]]


_Key = tuple[tuple[tuple[str, Strength], ...], Gate | None]


class AdapterSwitch:
    """Decides which of a module's LoRAs act, and how strongly.

    PEFT's and diffusers' ``set_adapters`` walk every module and every loaded adapter and touch
    ``requires_grad``. This collects the adapter layers once and then writes two things per layer:
    the list of active adapters and their scales. LoRAs are active in the order of their names,
    so that nothing depends on the order in which they were loaded.

    Args:
        module: a model with injected adapters (or without: then there is nothing to switch).
        direct: write PEFT's attributes directly; ``None`` finds out whether this version of PEFT
            has them. Otherwise its public methods are used, which is slower.
        fused: add plain LoRAs to copies of the weights, one copy per combination, and exchange the
            weights; others act beside their layer as usual.

    Raises:
        CmloraError: if LoRAs are fused into the weights, where they cannot be switched off; or if
            ``fused`` is asked for and the model is offloaded.
    """

    def __init__(
        self, module: nn.Module, *, direct: bool | None = None, fused: bool = False
    ) -> None:
        named = [(n, m) for n, m in module.named_modules() if isinstance(m, BaseTunerLayer)]
        self._layers = [layer for _, layer in named]
        # a layer inside another adapter's wrapping still goes by the denoiser's name for it
        self._places = [name.replace(".base_layer", "") for name, _ in named]
        self._held = [
            frozenset(name for held in _containers(layer) for name in held)
            for layer in self._layers
        ]
        self.names: tuple[str, ...] = tuple(sorted(frozenset().union(*self._held)))
        merged = sorted({name for layer in self._layers for name in layer.merged_adapters})
        if merged:
            raise CmloraError(
                f"{', '.join(merged)}: fused into the weights of {type(module).__name__}; "
                "call pipe.unfuse_lora() first"
            )
        known = all(map(_has_known_attributes, self._layers))
        self._direct = known if direct is None else direct
        self._activations: dict[_Key, _Activations] = {}
        self._gateable = {i for i, layer in enumerate(self._layers) if gateable(layer)}
        self._gated: list[dict[str, Any]] = []
        self._fused: dict[int, FusedWeight] = {}
        self._room = _REMEMBERED
        if fused:
            check_resident(module)
            self._fused = {i: FusedWeight(x) for i, x in enumerate(self._layers) if fusable(x)}
            self._room = len(self.names) + 1

    @property
    def layers(self) -> tuple[BaseTunerLayer, ...]:
        """The adapter layers."""
        return tuple(self._layers)

    def activate(self, weights: Mapping[str, Strength], gate: Gate | None = None) -> None:
        """Make exactly these LoRAs act, with these strengths; an empty mapping is the base model.

        A LoRA of strength 0 is inactive. A LoRA without layers in this module is ignored.

        Args:
            weights: strength by name.
            gate: how they share the layers; ``None`` adds them up.

        Raises:
            CmloraError: for a strength per block with a pattern that no layer of the LoRA has.
        """
        key = tuple(weights.items()), gate
        prepared = self._activations.pop(key, None)
        if prepared is None:
            room = self._room if gate is None else min(self._room, _GATED)
            while len(self._activations) >= room:
                del self._activations[next(iter(self._activations))]
            prepared = self._prepare(weights, gate)
        self._activations[key] = prepared  # the one used last stands last
        activation = prepared.layers
        self._ungate()
        for weight, value in prepared.exchanged:
            weight.put(value)
        for own, forward in prepared.forwards:
            self._gated.append(own)  # first, so that an interrupt leaves nothing behind
            own["forward"] = forward
        if not self._direct:
            for layer, _, names, scaling, scales, beside in activation:
                layer.enable_adapters(beside)
                layer.set_adapter(names, inference_mode=True)
                scaling.update(scales)
            return
        # past nn.Module.__setattr__, which costs more than everything else here
        for _, attributes, names, scaling, scales, beside in activation:
            attributes["_active_adapter"] = names
            attributes["_disable_adapters"] = not beside
            scaling.update(scales)

    def acts(self, name: str, pattern: str) -> bool:
        """Whether a LoRA has a layer in whose name an expression is found."""
        return any(re.search(pattern, place) for place in self._mine(name))

    def check_blocks(self, name: str, pattern: str) -> None:
        """Raises `CmloraError` if an expression is found in none of the layers of a LoRA."""
        mine = self._mine(name)
        if mine and not self.acts(name, pattern):
            blocks = sorted({".".join(place.split(".")[:2]) for place in mine}, key=_natural)
            raise CmloraError(
                f"{name}: no layer matches {pattern!r}; it acts in {', '.join(blocks)}"
            )

    def freeze(self) -> None:
        """Take ``requires_grad`` from all LoRA parameters, until `restore`.

        PEFT gives it to active adapters and to the one that was loaded last, and on a CPU it
        decides between kernels that round differently, even where no gradient is computed.
        """
        for parameter in self._parameters():
            parameter.requires_grad_(False)

    def snapshot(self) -> Snapshot:
        """The state of all layers now."""
        return Snapshot(
            attributes=tuple(
                {name: vars(layer).get(name, _MISSING) for name in _ATTRIBUTES}
                for layer in self._layers
            ),
            scaling=tuple(dict(_scaling(layer)) for layer in self._layers),
            requires_grad=tuple((p, p.requires_grad) for p in self._parameters()),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Put a snapshot of this module back, exactly; LoRAs deleted since then stay deleted."""
        self._activations.clear()
        self._ungate()
        for weight in self._fused.values():
            weight.restore()
        if not self._direct:
            for layer, attributes in zip(self._layers, snapshot.attributes, strict=True):
                active = attributes["_active_adapter"]
                if active is not _MISSING:
                    layer.set_adapter(active)
                layer.enable_adapters(attributes["_disable_adapters"] is not True)
        for layer, attributes in zip(self._layers, snapshot.attributes, strict=True):
            for name, value in attributes.items():
                if value is _MISSING:
                    vars(layer).pop(name, None)
                else:
                    vars(layer)[name] = value
        for layer, saved in zip(self._layers, snapshot.scaling, strict=True):
            scaling = _scaling(layer)
            scaling.update({name: value for name, value in saved.items() if name in scaling})
        for parameter, flag in snapshot.requires_grad:
            parameter.requires_grad_(flag)

    def _mine(self, name: str) -> list[str]:
        """The names of a LoRA's layers."""
        return [place for place, held in zip(self._places, self._held, strict=True) if name in held]

    def _parameters(self) -> Iterator[nn.Parameter]:
        """Every LoRA's parameters."""
        for layer in self._layers:
            for held in _containers(layer):
                yield from held.parameters()

    def _ungate(self) -> None:
        """Give gated layers their own forward back."""
        for own in self._gated:
            own.pop("forward", None)
        self._gated.clear()

    def _prepare(self, weights: Mapping[str, Strength], gate: Gate | None) -> _Activations:
        """Work out what activating these weights writes."""
        local = {name: self._resolve(name, weight) for name, weight in weights.items()}
        activation: list[_Activation] = []
        exchanged = []
        standing_in: list[tuple[dict[str, Any], Forward]] = []
        for index, (layer, held) in enumerate(zip(self._layers, self._held, strict=True)):
            here = {name: local[name][index] for name in sorted(local) if name in held}
            names = [name for name, weight in here.items() if weight != 0.0]
            scales = {name: _scale(layer, name, here[name]) for name in names}
            scales = {name: scale for name, scale in scales.items() if scale is not None}
            weight = self._fused.get(index)
            shared = names if gate and index in self._gateable and decides(gate, names) else []
            if weight is not None:
                if gate and shared:
                    shared = [name for name in shared if name not in gate.everywhere]
                within = {name: scales[name] for name in names if name not in shared}
                exchanged.append((weight, weight.under(within)))
            activation.append(
                _Activation(layer, vars(layer), names, _scaling(layer), scales, weight is None)
            )
            if gate and shared:
                standing_in.append((vars(layer), gated(layer, gate, shared, scales)))
        return _Activations(activation, exchanged, standing_in)

    def _resolve(self, name: str, strength: Strength) -> list[float]:
        """A LoRA's strength in every layer."""
        if not isinstance(strength, tuple):
            return [strength] * len(self._layers)
        try:
            patterns = [(re.compile(pattern), value) for pattern, value in strength]
        except re.error as error:
            raise CmloraError(
                f"{name}: {error.pattern!r} is no regular expression: {error}"
            ) from None
        # of expressions that were multiplied some may be found nowhere
        if not any(self.acts(name, pattern.pattern) for pattern, _ in patterns):
            self.check_blocks(name, patterns[0][0].pattern)
        return [
            next((value for pattern, value in patterns if pattern.search(place)), 0.0)
            for place in self._places
        ]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts block 10 after block 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]


def _has_known_attributes(layer: Any) -> bool:
    """Whether PEFT reads the attributes that a switch writes."""
    if not all(hasattr(layer, name) for name in _ATTRIBUTES):
        return False
    return (
        layer.active_adapter is layer._active_adapter
        and layer.disable_adapters is layer._disable_adapters
    )


def _containers(layer: Any) -> list[nn.ModuleDict | nn.ParameterDict]:
    """The dictionaries of a layer that hold LoRA weights by adapter name."""
    found = (getattr(layer, name) for name in layer.adapter_layer_names)
    return [held for held in found if isinstance(held, nn.ModuleDict | nn.ParameterDict)]


def _scaling(layer: Any) -> dict[str, Any]:
    """A layer's scale per LoRA; some kinds of adapters have none."""
    scaling = getattr(layer, "scaling", None)
    return scaling if isinstance(scaling, dict) else {}


def _scale(layer: Any, name: str, weight: float) -> Any:
    """What PEFT itself makes of a strength, to the bit."""
    scaling = _scaling(layer)
    if name not in scaling or not hasattr(layer, "set_scale"):
        if weight == 1.0:
            return None
        raise CmloraError(
            f"{name}: adapters of type {type(layer).__name__} have no strength; "
            f"use weight 1 instead of {weight}"
        )
    before = scaling[name]
    layer.set_scale(name, weight)
    scale = scaling[name]
    scaling[name] = before
    return scale
