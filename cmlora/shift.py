"""Changes of whole weights and biases in a running model, by adapter name, as PEFT's LoRAs are.

PEFT's LoRA layers hold products of factors in linear layers and convolutions. This holds what is
none: full matrices, biases, the weights of normalisation layers and of embeddings. It goes next to
the wrapped layer, inside of LoRA layers, and everything that switches, scales, fuses or removes
adapters of PEFT finds it.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional

from cmlora.errors import CmloraError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ShiftLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A layer whose weight and bias are shifted by each active adapter, times its strength.

    Args:
        base_layer: any layer whose parameters are called ``weight`` and ``bias``.
    """

    adapter_layer_names = ("shift_weight", "shift_bias")
    other_param_names = ("scaling",)

    # PEFT's, which has no types.
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Any
    set_adapter: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.shift_weight = nn.ParameterDict()
        self.shift_bias = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self._active_adapter: Any = []
        self.merged_adapters: list[str] = []
        self._backup: tuple[Tensor | None, Tensor | None] | None = None

    def __getattr__(self, name: str) -> Any:
        """What the wrapped layer has beside its parameters: models ask norms for their eps."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def add(self, name: str, weight: Tensor | None, bias: Tensor | None) -> None:
        """Adds an adapter, which is the active one afterwards; strength 1.

        Raises:
            ValueError: if a shift has another shape than what it shifts, or nothing to shift.
        """
        own: Any = self.base_layer
        for held, shift, mine in (
            (self.shift_weight, weight, own.weight),
            (self.shift_bias, bias, getattr(own, "bias", None)),
        ):
            if shift is None:
                continue
            if mine is None and not isinstance(own, (nn.Linear, *_CONVOLUTIONS)):
                raise ValueError(f"a {type(own).__name__} without bias has none to change")
            shape = (len(own.weight),) if mine is None else tuple(mine.shape)
            if tuple(shift.shape) != shape:
                raise ValueError(f"a shift is {tuple(shift.shape)} and should be {shape}")
            held[name] = nn.Parameter(shift, requires_grad=False)
        self.scaling[name] = 1.0
        self.set_adapter([name], inference_mode=True)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [n for n in self.active_adapters if self.scaling.get(n, 0.0) != 0.0]
        if self.disable_adapters or self.merged or not names:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        if not isinstance(self.base_layer, (nn.Linear, *_CONVOLUTIONS)):
            return self._moved(names, x, *args, **kwargs)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in names:
            # Beside the base's output, which may come from quantized weights.
            result = result + self._beside(name, x).to(result.dtype) * self.scaling[name]
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The shift of the weight at its present strength."""
        base = self.get_base_layer().weight
        if adapter not in self.shift_weight:
            return torch.zeros_like(base)
        shift: Tensor = self.shift_weight[adapter] * self.scaling[adapter]
        return shift

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is an update of the weight alone."""
        return adapter_name in self.shift_weight and adapter_name not in self.shift_bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the parameters, which are kept, so that `unmerge` restores their bits.

        Raises:
            ValueError: if ``safe_merge`` finds that the result is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.scaling]
        if not names:
            return
        base = self.get_base_layer()
        own_bias = getattr(base, "bias", None)
        found: list[Tensor | None] = []
        for shifts, own in ((self.shift_weight, base.weight), (self.shift_bias, own_bias)):
            total = None if own is None else own.detach().clone()
            for name in names:
                if name in shifts and total is None:
                    raise CmloraError(f"{name} changes a bias that the layer does not have")
                if name in shifts:
                    total = total + shifts[name].detach() * self.scaling[name]
            if safe_merge and total is not None and not bool(torch.isfinite(total).all()):
                raise ValueError(f"{', '.join(names)}: the merged weight is not finite")
            found.append(total)
        if self._backup is None:
            self._backup = (
                base.weight.detach().clone(),
                None if own_bias is None else own_bias.detach().clone(),
            )
        self._write(found[0], found[1])
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self) -> None:
        """Puts the parameters back as they were, bit for bit; without a merge it does nothing."""
        if self._backup is not None:
            self._write(*self._backup)
        self._backup, self.merged_adapters = None, []

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the strength of an adapter; 1 is what its file says."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the strength of the active adapters; ``None`` sets it to 1."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.scaling[name] / scale if scale else 1.0

    def _beside(self, name: str, x: Tensor) -> Tensor:
        """What one adapter adds to the output of a linear layer or convolution, at strength 1."""
        base: Any = self.base_layer
        bias: Tensor | None = self.shift_bias.get(name)
        if name not in self.shift_weight:
            assert bias is not None
            ones = 0 if isinstance(base, nn.Linear) else base.weight.ndim - 2
            return bias.reshape(-1, *[1] * ones)
        weight = self.shift_weight[name].to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        if isinstance(base, nn.Linear):
            return functional.linear(x, weight, bias)
        result: Tensor = base._conv_forward(x, weight, bias)
        return result

    def _moved(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of a layer that is no product with its weight."""
        layer: Any = self.base_layer
        own: dict[str, Any] = {"weight": layer.weight, "bias": getattr(layer, "bias", None)}
        held = {"weight": self.shift_weight, "bias": self.shift_bias}
        moved: dict[str, Tensor] = {}
        for parameter, shifts in held.items():
            total = own[parameter]
            for name in names:
                if name in shifts:
                    total = total + shifts[name].to(total) * self.scaling[name]
            if total is not own[parameter]:
                moved[parameter] = total
        result: Tensor = torch.func.functional_call(self.base_layer, moved, (x, *args), kwargs)
        return result

    def _write(self, weight: Tensor | None, bias: Tensor | None) -> None:
        base = self.get_base_layer()
        for own, value in ((base.weight, weight), (getattr(base, "bias", None), bias)):
            if own is not None and value is not None:
                own.data.copy_(value)


def wrap(model: nn.Module, name: str) -> ShiftLayer:
    """The shift layer around a layer of a model; it is put in if it is not there.

    Args:
        model: any.
        name: of the layer, which LoRAs may have wrapped already.
    """
    parent_name, _, child = name.rpartition(".")
    parent, layer = model.get_submodule(parent_name), model.get_submodule(name)
    while isinstance(layer, BaseTunerLayer) and not isinstance(layer, ShiftLayer):
        parent, child, layer = layer, "base_layer", layer.base_layer
    if isinstance(layer, ShiftLayer):
        return layer
    shift = ShiftLayer(layer)
    shift.train(layer.training)
    setattr(parent, child, shift)
    return shift
