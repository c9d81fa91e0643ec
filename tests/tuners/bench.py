"""Small layers with adapters on them, for the tests of tuners."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from cmlora.adapters.tuners import TUNERS
from cmlora.adapters.tuners.layer import TunerLayer

OPTIONS: dict[str, dict[str, Any]] = {
    "nola": {"r": 3, "down_count": 7, "up_count": 5, "alpha": 6},
    "randlora": {"r": 3, "alpha": 6},
    "vera": {"r": 5},
    "lora_xs": {"r": 3, "alpha": 6},
    "lora_sb": {"r": 3},
    "pissa": {"r": 3, "alpha": 6},
    "loldu": {"r": 3},
    "svfit": {"r": 4},
    "hydra": {"r": 2, "sequential_r": 3, "alpha": 3},
    "block_lora": {"r": 4, "blocks": 2, "alpha": 6},
    "snell": {"r": 4, "sparsity": 0.3, "sparsify": "soft", "factor": 1.0},
    "snella": {"r": 4, "sparsity": 0.3, "sparsify": "hard", "factor": 1.0},
    "s2ft": {"share": 0.3},
    "dylora": {"r": 4, "alpha": 6},
    "maestro": {"r": 4, "alpha": 6},
    "allora": {"r": 3},
    "orthogonal": {"r": 2, "slot": 1},
    "sltrain": {"r": 2, "alpha": 6, "density": 0.1},
    "lost": {"r": 2, "columns": 0.2},
    "oft": {"r": 4},
    "boft": {"r": 2, "count": 1},
    "miss": {"r": 3},
    "ia3": {},
}
"""Settings of the methods for layers with a dozen channels."""

BASES = ("linear", "wide", "bare", "conv1", "conv3", "strided", "grouped")


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


def base(kind: str, seed: int = 0) -> nn.Module:
    """A layer by name."""
    torch.manual_seed(seed)
    kinds: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(8, 12),
        "wide": lambda: nn.Linear(12, 8),
        "bare": lambda: nn.Linear(12, 12, bias=False),
        "conv1": lambda: nn.Conv2d(8, 12, 1),
        "conv3": lambda: nn.Conv2d(4, 8, 3, padding=1),
        "strided": lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=1),
        "grouped": lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4),
    }
    return kinds[kind]()


def data(layer: nn.Module, seed: int = 0) -> Tensor:
    """An input of a layer."""
    random = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Linear):
        return torch.randn(2, 3, layer.in_features, generator=random)
    assert isinstance(layer, nn.Conv2d)
    return torch.randn(2, layer.in_channels, 6, 6, generator=random)


def settings(name: str, targets: Any = ("layer",), **options: Any) -> Any:
    """The settings of a method for small layers."""
    targets = targets if isinstance(targets, str) else list(targets)
    return TUNERS[name].object.settings(target_modules=targets, **OPTIONS[name] | options)


def adapt(name: str, kind: str, adapters: tuple[str, ...] = ("a",), **options: Any) -> Holder:
    """A layer with adapters of one method."""
    model = Holder(base(kind)).eval()
    for adapter in adapters:
        inject(model, settings(name, **options), adapter)
    return model


def inject(model: nn.Module, config: Any, adapter: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is another adapter already
        inject_adapter_in_model(config, model, adapter)


def layers(model: nn.Module) -> list[TunerLayer]:
    return [module for module in model.modules() if isinstance(module, TunerLayer)]


def shake(model: nn.Module, adapter: str = "a", seed: int = 1, size: float = 0.3) -> None:
    """Moves everything that is trained away from its start."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model):
            for attribute in layer.adapter_layer_names:
                held = getattr(layer, attribute)
                if adapter in held:
                    noise = torch.randn(held[adapter].shape, generator=random)
                    held[adapter].add_(noise * size)


def tensors(layer: TunerLayer, adapter: str = "a") -> dict[str, Any]:
    """Trained and stored tensors by their short names."""
    return {
        title: layer.tensor(adapter, title).detach().double().numpy()
        for title in (*layer.trained, *layer.stored)
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's warnings that there is an adapter already, or that one was deleted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal but for rounding."""
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def adapted(name: str, kind: str = "linear", shaken: bool = True, **options: Any) -> Any:
    """The first layer of a model with a tuner, its parameters away from the start."""
    model = adapt(name, kind, **options)
    if shaken:
        shake(model)
    return layers(model)[0]


def delta(layer: Any) -> Tensor:
    """The update of a layer, (out, rest)."""
    result: Tensor = layer.get_delta_weight("a").detach().flatten(1)
    return result


def rank(matrix: Tensor) -> int:
    """Numerical rank."""
    return int(torch.linalg.matrix_rank(matrix.double(), rtol=1e-5))
