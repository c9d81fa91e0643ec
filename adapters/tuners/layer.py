"""What every tuner shares: a wrapped linear or convolution layer with updates by name.

A tuner says how its tensors start and what update of the flattened weight (O, I) they stand for;
I is the number of weights per output, in channels times kernel for a convolution. Everything else
is here, once: forward, merging, strengths, several adapters. The wrapped weight never changes at
the start, so adapters can be added, scaled and removed independently of each other.
"""

from __future__ import annotations

import zlib
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional

from cmlora.adapters.tuners.plugin import TunerConfig, prefix_of
from cmlora.adapters.tuners.tensors import full, generator
from cmlora.errors import CmloraError


class TunerLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear or convolution layer with updates by adapter name.

    Subclasses set `trained` and `stored` (tensors that are not trained but saved), define `start`
    and one of `factors` and `update`, and may define `constants` and `bias_update`.

    Args:
        base_layer: the layer, possibly wrapped by another tuner already.
        adapter_name: of the first adapter.
        config: its settings.
        key: name of the layer in the model; different layers draw different random numbers.
    """

    method: ClassVar[str] = ""
    trained: ClassVar[tuple[str, ...]] = ()
    stored: ClassVar[tuple[str, ...]] = ()
    costly: ClassVar[bool] = False  # to form; kept between forward passes without gradients

    # PEFT's, which has no types.
    adapter_layer_names: tuple[str, ...]
    other_param_names: tuple[str, ...]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Any
    set_adapter: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        prefix = prefix_of(cls.method)
        cls.adapter_layer_names = tuple(prefix + title for title in cls.trained)
        plain = ("r", "scaling", "config", "seeds", "initial", "frozen_tensors", "state", "ready")
        cls.other_param_names = (*(prefix + title for title in cls.stored), *plain)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: TunerConfig, key: str
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ParameterDict())
        for title in self.stored:
            setattr(self, prefix_of(self.method) + title, BufferDict(persistent=True))
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.initial: dict[str, float] = {}
        self.config: dict[str, Any] = {}
        self.seeds: dict[str, int] = {}
        self.state: dict[str, Any] = {}
        self.ready: dict[str, tuple[Any, Any]] = {}
        self.frozen_tensors: dict[str, dict[str, Tensor]] = {}
        self._backup: tuple[Tensor, Tensor | None] | None = None
        self._applied: tuple[Tensor, Tensor | None] | None = None
        self._merged_with: dict[str, float] = {}
        self._disable_adapters = False
        self._active_adapter: Any = adapter_name
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, config, key)

    # What a method defines.

    def start(self, name: str) -> dict[str, Tensor]:
        """Initial values of the trained and the stored tensors."""
        raise NotImplementedError

    def constants(self, name: str) -> dict[str, Tensor]:
        """Frozen tensors that follow from the weight or the seed; computed when first needed."""
        return {}

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Up (O, R) and down (R, I) whose product is `update`, if there are any."""
        return None

    def update(self, name: str) -> Tensor:
        """The update of the flattened weight (O, I), without its strength; differentiable."""
        factors = self.factors(name)
        if factors is None:
            raise NotImplementedError
        return factors[0] @ factors[1]

    def bias_update(self, name: str) -> Tensor | None:
        """The update of the bias (O,), without its strength."""
        return None

    def mergeable(self, name: str) -> bool:
        """Whether the adapter is an update of the weight, and not a function of its own."""
        return True

    # What a method uses.

    def held(self, name: str, title: str) -> Tensor:
        """A trained or stored tensor as it is."""
        tensor: Tensor = getattr(self, prefix_of(self.method) + title)[name]
        return tensor

    def tensor(self, name: str, title: str) -> Tensor:
        """A trained or stored tensor in at least single precision."""
        tensor = self.held(name, title)
        return full(tensor) if tensor.is_floating_point() else tensor

    def frozen(self, name: str, title: str) -> Tensor:
        """One of the `constants`, where the weight is."""
        found = self.frozen_tensors.get(name)
        device = self.get_base_layer().weight.device
        if found is None or next(iter(found.values())).device != device:
            # Also in inference mode, whose tensors could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                found = {t: v.to(device) for t, v in (found or self.constants(name)).items()}
            self.frozen_tensors[name] = found
        return found[title]

    def matrix(self) -> Tensor:
        """The weight without any adapter, flattened to (O, I)."""
        weight = self._backup[0] if self._backup else self.get_base_layer().weight
        return full(weight.detach()).flatten(1)

    def vector(self) -> Tensor | None:
        """The bias without any adapter (O,)."""
        bias = self._backup[1] if self._backup else self.get_base_layer().bias
        return None if bias is None else full(bias.detach())

    def random(self, name: str) -> torch.Generator:
        """Random numbers of this adapter and layer, the same on every device."""
        return generator(self.seeds[name])

    # What PEFT and diffusers call.

    def update_layer(
        self, adapter_name: str, config: TunerConfig, key: str, inference_mode: bool = False
    ) -> None:
        """Adds an adapter."""
        self._check(adapter_name, key)
        # Text encoders carry the prefix or not, depending on the version of transformers.
        place = key.removeprefix("text_model.")
        self.seeds[adapter_name] = zlib.crc32(f"{config.seed}/{place}".encode())
        self.config[adapter_name], self.r[adapter_name] = config, config.r
        self.initial[adapter_name] = self.scaling[adapter_name] = config.strength()
        self.frozen_tensors.pop(adapter_name, None)
        with torch.no_grad():
            values = self.start(adapter_name)
        weight = self.get_base_layer().weight
        for title, value in values.items():
            held = getattr(self, prefix_of(self.method) + title)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            value = value.to(weight.device, dtype if value.is_floating_point() else None)
            value = value.clone(memory_format=torch.contiguous_format)
            held[adapter_name] = nn.Parameter(value) if title in self.trained else value
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if self.scaling.get(name, 0.0) != 0.0:
                result = result + self.change(name, x).to(result.dtype)
        return result

    def change(self, name: str, x: Tensor) -> Tensor:
        """What one adapter adds to the output for input ``x``, at its strength."""
        formed = self._formed(name)
        bias = self.bias_update(name)
        scale = self.scaling[name]
        if isinstance(formed, Tensor):
            shift = None if bias is None else bias * scale
            return self.apply_matrix(x, formed * scale, shift)
        up, down = formed
        hidden = self.apply_matrix(x, down)
        return self.apply_up(hidden, up * scale, None if bias is None else bias * scale)

    def apply_matrix(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer with another flattened weight (any, I)."""
        base = self.get_base_layer()
        bias = None if bias is None else bias.to(x.dtype)
        if isinstance(base, nn.Linear):
            return functional.linear(x, matrix.to(x.dtype), bias)
        kernel = matrix.reshape(-1, *base.weight.shape[1:]).to(x.dtype)
        result: Tensor = base._conv_forward(x, kernel, bias)
        return result

    def apply_up(self, hidden: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
        """Up (O, R) applied to the channels of the output of a down factor."""
        up = up.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
        if isinstance(self.get_base_layer(), nn.Linear):
            return functional.linear(hidden, up, bias)
        return functional.conv2d(hidden, up[..., None, None], bias)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update at its present strength, shaped like the weight."""
        self._need_mergeable(adapter)
        shape = self.get_base_layer().weight.shape
        return (self.update(adapter) * self.scaling[adapter]).reshape(shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the weight; the weight before is kept, and `unmerge` restores its bits.

        Raises:
            ValueError: if ``safe_merge`` finds that the result is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.scaling]
        if not names:
            return
        for name in names:
            self._need_mergeable(name)
        base = self.get_base_layer()
        scales = self._merged_with | {name: self.scaling[name] for name in names}
        with torch.no_grad():
            weight, bias = self.matrix().clone(), self.vector()
            for name, scale in scales.items():
                weight += self.update(name) * scale
                shift = self.bias_update(name)
                if shift is not None and bias is not None:
                    bias = bias + shift * scale
            if safe_merge and not bool(torch.isfinite(weight).all()):
                raise ValueError(f"{', '.join(names)}: the merged weight is not finite")
            if self._backup is None:
                self._backup = self._copies()
            self._write(weight.reshape(base.weight.shape), bias)
            self._applied = self._copies()
        self._merged_with = scales
        self.merged_adapters = list(scales)

    def unmerge(self) -> None:
        """Puts the weight back as it was, bit for bit; without a merge it does nothing."""
        if self._backup is None:
            return
        with torch.no_grad():
            self._write(*self._backup)
        self._backup = self._applied = None
        self._merged_with, self.merged_adapters = {}, []

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the weight of an adapter; 1 is the strength it was made with."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the strength of the active adapters; ``None`` sets it to that of weight 1."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.scaling[name] / scale if scale else self.initial[name]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT can approximate the adapter by a LoRA."""
        return adapter_name in self.scaling and self.mergeable(adapter_name)

    def _formed(self, name: str) -> tuple[Tensor, Tensor] | Tensor:
        """The factors, or the update where there are none or they do not serve."""
        tensors = [getattr(self, attribute)[name] for attribute in self.adapter_layer_names]
        keep = self.costly and not self.training and not torch.is_grad_enabled()
        # In-place changes count up the version, moves and casts change the place.
        key = [(t.data_ptr(), t._version, t.dtype) for t in tensors] if keep else None
        if not keep:
            self.ready.pop(name, None)  # training writes past the version
        elif name in self.ready and self.ready[name][0] == key:
            found: tuple[Tensor, Tensor] | Tensor = self.ready[name][1]
            return found
        factors = self.factors(name) if self._groups == 1 else None
        formed = self.update(name) if factors is None else factors
        if keep and not torch.is_inference_mode_enabled():
            self.ready[name] = (key, formed)
        return formed

    def _copies(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias as they are now."""
        base = self.get_base_layer()
        bias = None if base.bias is None else base.bias.detach().clone()
        return base.weight.detach().clone(), bias

    def _write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Sets weight and bias; what another tuner has merged in the meantime stays merged."""
        base = self.get_base_layer()
        before = self._applied or (None, None)
        for parameter, value, last in zip(
            (base.weight, base.bias), (weight, bias), before, strict=True
        ):
            if value is None:
                continue
            now = parameter.detach()
            if last is not None and not torch.equal(now, last.to(now)):
                value = full(value).to(now.device) + (full(now) - full(last).to(now.device))
            parameter.data.copy_(value)

    @property
    def _groups(self) -> int:
        return int(getattr(self.get_base_layer(), "groups", 1))

    def _need_mergeable(self, name: str) -> None:
        if not self.mergeable(name):
            raise CmloraError(
                f"{name}: a {self.method} adapter with these settings is no update of the weight, "
                "so it can be neither merged nor exported"
            )

    def _check(self, name: str, key: str) -> None:
        base = self.get_base_layer()
        if not isinstance(base, nn.Linear | nn.Conv2d):
            raise CmloraError(
                f"{key} is a {type(base).__name__}; {self.method} adapts Linear and Conv2d"
            )
        if not base.weight.is_floating_point():
            raise CmloraError(f"{key} is quantized; {self.method} needs floating point weights")
        if name in self.merged_adapters:
            raise CmloraError(f"{name} is fused into {key}; unfuse it before adding it again")
