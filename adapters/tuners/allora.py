"""ALLoRA: each row of a LoRA learns at a pace of its own, fast where it is still small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.tensors import kaiming


@dataclass
class AlloraConfig(TunerConfig):
    """Settings of ALLoRA, which has neither alpha nor dropout.

    Args:
        pace: eta, what the gradient of a row is multiplied by while its update is zero.
    """

    pace: float = 2.0
    method: ClassVar[str] = "allora"


class AlloraLayer(TunerLayer):
    """``B A`` whose gradients are scaled by ``1 / sqrt(|(B A)_i| + 1 / eta^2)`` per output i.

    arXiv:2410.09692. Only what flows into ``A`` and ``B`` is scaled; the gradient of the input is
    that of a LoRA. The pace is above that of a LoRA while ``|(B A)_i|`` is below ``1 - 1 / eta^2``,
    under gradient descent; Adam divides by the size of gradients, and takes most of it back.
    """

    method = "allora"
    trained = ("down", "up")

    def start(self, name: str) -> dict[str, Tensor]:
        outputs, inputs = self.matrix().shape
        down = kaiming(self.r[name], inputs, self.random(name))
        return {"down": down, "up": torch.zeros(outputs, self.r[name])}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensor(name, "up"), self.tensor(name, "down")

    def pace(self, name: str) -> Tensor:
        """The factor of each output's gradient (O,)."""
        with torch.no_grad():
            norms = self.update(name).norm(dim=1)
            least: float = self.config[name].pace ** -2
            result: Tensor = (norms + least).rsqrt()
        return result

    def change(self, name: str, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not self.held(name, "up").requires_grad:
            return super().change(name, x)
        # Twice the same: once for the input's gradient, once for the scaled one of the factors.
        up, down = (tensor.detach() for tensor in self.factors(name))
        plain = self._branch(x, up, down, name)
        scaled: Tensor = _Scaled.apply(
            self._branch(x.detach(), *self.factors(name), name), self._per_output(name)
        )
        return plain + (scaled - scaled.detach())

    def _branch(self, x: Tensor, up: Tensor, down: Tensor, name: str) -> Tensor:
        up = up * self.scaling[name]
        if self._groups != 1:
            return self.apply_matrix(x, up @ down)
        return self.apply_up(self.apply_matrix(x, down), up)

    def _per_output(self, name: str) -> Tensor:
        pace = self.pace(name)
        return pace if self.get_base_layer().weight.ndim == 2 else pace[:, None, None]


class _Scaled(torch.autograd.Function):
    """The identity, with a scaled gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradients[0] * scale.to(gradients[0].dtype), None
