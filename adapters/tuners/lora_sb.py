"""LoRA-SB: a small trained matrix between frozen factors of the first full update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.lora_xs import fixed_signs
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.tensors import svd
from cmlora.errors import CmloraError


@dataclass
class LoraSbConfig(TunerConfig):
    """Settings of LoRA-SB; ``alpha`` cancels in its theory and is best left alone."""

    r: int = 32
    method: ClassVar[str] = "lora_sb"


class LoraSbLayer(TunerLayer):
    """``B M A`` with frozen orthonormal ``B`` (O, R), ``A`` (R, I), training ``M`` (R, R).

    arXiv:2411.19557. Until `prime` is called the factors are singular vectors of the weight and
    ``M`` is zero. The factors depend on data, so they are saved.
    """

    method = "lora_sb"
    trained = ("core",)
    stored = ("up", "down")

    def start(self, name: str) -> dict[str, Tensor]:
        left, values, right = svd(self.matrix(), self.r[name])
        left, right = fixed_signs(left, right)
        return {"core": torch.zeros(len(values), len(values)), "up": left, "down": right}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        core = self.tensor(name, "core")
        return self.tensor(name, "up"), core @ self.tensor(name, "down")

    @torch.no_grad()
    def prime(self, name: str, gradient: Tensor, rate: float, sign: bool = True) -> None:
        """Starts from the best rank-R approximation of the first step of full training.

        Args:
            name: of the adapter.
            gradient: average gradient of the loss with respect to the weight, shaped like it.
            rate: the learning rate of that step.
            sign: the step of AdamW, which is the sign of the gradient; otherwise that of SGD.
        """
        matrix = gradient.to(self.matrix()).flatten(1)
        step = -rate * (matrix.sign() if sign else matrix)
        left, values, right = svd(step, self.r[name])
        for title, value in (("up", left), ("down", right)):
            self.held(name, title).copy_(value)
        self.held(name, "core").copy_(values.diag() / self.initial[name])


def prime(
    model: nn.Module, name: str, gradients: Mapping[str, Tensor], rate: float, sign: bool = True
) -> None:
    """`LoraSbLayer.prime` for every layer of a model.

    Args:
        model: with a LoRA-SB adapter.
        name: of the adapter.
        gradients: by name of the layer.
        rate: the learning rate of the first step.
        sign: see `LoraSbLayer.prime`.

    Raises:
        CmloraError: if a layer has no gradient.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraSbLayer) and name in m.r}
    missing = sorted(layers.keys() - gradients.keys())
    if missing or not layers:
        raise CmloraError(f"{name}: no gradient for {', '.join(missing[:3]) or 'any layer'}")
    for key, layer in layers.items():
        layer.prime(name, gradients[key], rate, sign)
