"""Layers that hold a compact form and still look like what they replace.

They are `nn.Linear` and `nn.Conv2d` for everybody who asks, so that LoRAs are put on them as on
any other layer; ``weight`` is made when it is read.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cmlora.adapters.compression.form import KINDS, Form, dense


class _Compact(nn.Module):
    """Where the tensors of a form are kept: parameters if they are numbers, buffers otherwise."""

    kind: str
    fields: tuple[str, ...]
    width: int | None = None
    """How many of the factors are used in a forward pass; all if not given."""

    def _hold(self, form: Form, bias: nn.Parameter | None) -> None:
        self.kind, stored = form.kind, form.tensors()
        self.fields = tuple(stored)
        for name, any_strides in stored.items():
            # Equal strides before and after storage make equal results, bit for bit.
            tensor = any_strides.contiguous()
            if tensor.is_floating_point():
                self.register_parameter(f"form_{name}", nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(f"form_{name}", tensor)
        self.register_parameter("bias", bias)

    def form(self) -> Form:
        """The form that is held."""
        return KINDS[self.kind](**{name: getattr(self, f"form_{name}") for name in self.fields})

    def _stages(self, dtype: torch.dtype) -> list[Tensor]:
        stages = [stage.to(dtype) for stage in self.form().stages()]
        if self.width is not None and len(stages) == 2:
            stages = [stages[0][: self.width], stages[1][:, : self.width]]
        return stages


def _ours(arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether a compact layer is asked for, by its constructor or a copy, not a plain one."""
    return isinstance(arguments[0], nn.Module) if arguments else not options


class CompactLinear(_Compact, nn.Linear):
    """A linear layer in a compact form.

    Args:
        layer: what it replaces.
        form: of the matrix (O, I).
    """

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        """The layer, or an ordinary one: PEFT makes its factors by calling the layer's type."""
        ours = _ours(arguments, options)
        return super().__new__(cls) if ours else nn.Linear(*arguments, **options)

    def __init__(self, layer: nn.Linear, form: Form) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._hold(form, cast("nn.Parameter | None", layer.bias))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(O, I), made anew each time."""
        return dense(self.form())

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O), one stage after the other."""
        *first, last = self._stages(x.dtype)
        for stage in first:
            x = functional.linear(x, stage)
        return functional.linear(x, last, self.bias)


class CompactConv2d(_Compact, nn.Conv2d):
    """A convolution in a compact form: kernels to k channels, then a mixture of those.

    Args:
        layer: what it replaces; groups are 1 and the padding is made of zeros.
        form: of the matrix (O, I * kh * kw).
    """

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        """The layer, or an ordinary one: PEFT makes its factors by calling the layer's type."""
        ours = _ours(arguments, options)
        return super().__new__(cls) if ours else nn.Conv2d(*arguments, **options)

    def __init__(self, layer: nn.Conv2d, form: Form) -> None:
        nn.Module.__init__(self)
        for name in nn.Conv2d.__constants__:
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.transposed = layer.transposed
        self._hold(form, cast("nn.Parameter | None", layer.bias))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(O, I, kh, kw), made anew each time."""
        return dense(self.form()).reshape(-1, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) to (B, O, H', W')."""
        kernels, *rest = self._stages(x.dtype)
        kernels = kernels.reshape(-1, self.in_channels, *self.kernel_size)
        bias = None if rest else self.bias
        hidden = functional.conv2d(x, kernels, bias, self.stride, self.padding, self.dilation)
        for stage in rest:
            hidden = functional.conv2d(hidden, stage[:, :, None, None], self.bias)
        return hidden


def wrap(layer: nn.Module, form: Form) -> CompactLinear | CompactConv2d:
    """The layer with its matrix in a compact form."""
    if isinstance(layer, nn.Linear):
        return CompactLinear(layer, form)
    assert isinstance(layer, nn.Conv2d)
    return CompactConv2d(layer, form)


def fits(layer: nn.Module) -> bool:
    """Whether there is a compact layer that can take the place of this one."""
    if type(layer) is nn.Linear:
        return True
    return type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"


def matrix_of(layer: nn.Module) -> Tensor:
    """(O, I) of a linear layer, (O, I * kh * kw) of a convolution."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1)
