"""PiSSA: a LoRA that starts as the leading part of the weight, which it replaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, cat

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.tensors import svd


@dataclass
class PissaConfig(TunerConfig):
    """Settings of PiSSA."""

    method: ClassVar[str] = "pissa"


class PissaLayer(TunerLayer):
    """``B A - B0 A0`` where ``B0 A0`` is the best rank-R approximation of the weight.

    arXiv:2404.02948, as an update: the weight stays whole instead of losing its leading part, so
    that adapters are independent of each other and leave nothing behind. ``B`` and ``A`` start at
    ``U_r sqrt(S_r / s)`` and ``sqrt(S_r / s) V_r^T``, with s the strength. An ordinary LoRA of
    rank 2R is the same update.
    """

    method = "pissa"
    trained = ("down", "up")

    def start(self, name: str) -> dict[str, Tensor]:
        return {title: self.frozen(name, title) for title in ("down", "up")}

    def constants(self, name: str) -> dict[str, Tensor]:
        left, values, right = svd(self.matrix(), self.r[name])
        root = (values / self.initial[name]).sqrt()
        return {"up": left * root, "down": root[:, None] * right}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        # Through the parameters' own precision, so that the two cancel exactly at the start.
        up, down = self.tensor(name, "up"), self.tensor(name, "down")
        dtype = self.held(name, "up").dtype
        first_up = self.frozen(name, "up").to(dtype).to(up.dtype)
        first_down = self.frozen(name, "down").to(dtype).to(down.dtype)
        return cat([up, -first_up], 1), cat([down, first_down])

    def update(self, name: str) -> Tensor:
        up, down = self.factors(name)
        half = up.shape[1] // 2
        return up[:, :half] @ down[:half] + up[:, half:] @ down[half:]

    def change(self, name: str, x: Tensor) -> Tensor:
        up, down = self.factors(name)
        if self._groups != 1:
            return self.apply_matrix(x, self.update(name) * self.scaling[name])
        half = up.shape[1] // 2
        first = self.apply_up(self.apply_matrix(x, down[:half]), up[:, :half])
        second = self.apply_up(self.apply_matrix(x, down[half:]), up[:, half:])
        return (first + second) * self.scaling[name]
