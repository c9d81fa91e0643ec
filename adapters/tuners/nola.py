"""NOLA: both factors are mixtures of random matrices, and only the mixture is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmlora.adapters.tuners.layer import TunerLayer
from cmlora.adapters.tuners.plugin import TunerConfig
from cmlora.adapters.tuners.tensors import generator, kaiming, uniform
from cmlora.errors import CmloraError

_CHUNK = 2**22


@dataclass
class NolaConfig(TunerConfig):
    """Settings of NOLA.

    Args:
        down_count: random matrices in the mixture of the down factor.
        up_count: random matrices in the mixture of the up factor.
    """

    down_count: int = 512
    up_count: int = 512
    method: ClassVar[str] = "nola"


class NolaLayer(TunerLayer):
    """``A = A0 + sum_i a_i U_i`` (R, I), ``B = sum_j c_j V_j`` (O, R), update ``B A``.

    arXiv:2310.02556, in the variant with a frozen offset ``A0``, so that nothing changes at the
    start although all coefficients are zero. Every random matrix comes from the layer's seed and is
    drawn again in the backward pass instead of being kept.
    """

    method = "nola"
    trained = ("down", "up")
    costly = True

    def start(self, name: str) -> dict[str, Tensor]:
        config = self.config[name]
        return {"down": torch.zeros(config.down_count), "up": torch.zeros(config.up_count)}

    def constants(self, name: str) -> dict[str, Tensor]:
        return {"offset": kaiming(self.r[name], self.matrix().shape[1], self.random(name))}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        outputs, inputs = self.matrix().shape
        rank, seed = self.r[name], self.seeds[name]
        down = mixture(self.tensor(name, "down"), (rank, inputs), seed + 1)
        up = mixture(self.tensor(name, "up"), (outputs, rank), seed + 2)
        offset = self.frozen(name, "offset").to(down.dtype)
        return up, offset + down


@torch.no_grad()
def quantise(model: nn.Module, name: str, bits: int) -> None:
    """Rounds all coefficients of an adapter to a grid of ``2^bits - 1`` values per vector.

    Raises:
        CmloraError: if there is no such adapter, or not from 2 to 16 bits.
    """
    layers = [m for m in model.modules() if isinstance(m, NolaLayer) and name in m.r]
    if not layers or not 2 <= bits <= 16:
        raise CmloraError(f"{name}: {bits} bits, {len(layers)} NOLA layers; expected 2 to 16 bits")
    for layer in layers:
        for title in layer.trained:
            held = layer.held(name, title)
            unit = held.abs().max() / (2 ** (bits - 1) - 1)
            if float(unit) > 0:
                held.copy_((held / unit).round() * unit)


def mixture(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    """``sum_k c_k M_k / sqrt(K)`` with ``M_k`` uniform in -1..1, drawn in chunks from the seed."""
    result: Tensor = checkpoint(
        _mixture, coefficients, shape, seed, use_reentrant=False, preserve_rng_state=False
    )
    return result


def _mixture(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    random = generator(seed)
    size = shape[0] * shape[1]
    total = coefficients.new_zeros(size)
    for part in torch.split(coefficients, max(1, _CHUNK // size)):
        bases = uniform((len(part), size), 1.0, random).to(part)
        total = total + part @ bases
    factor: float = len(coefficients) ** -0.5
    return total.reshape(shape) * factor
