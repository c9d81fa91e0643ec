"""An adapter of any kind between two ordinary LoRAs gives the picture of its exported LoRA."""

from typing import Any

import pytest
import torch

import cmlora
from cmlora.adapters.tuners import TUNERS
from cmlora.adapters.tuners.export import to_lora
from cmlora.insert import insert
from tests import tiny
from tests.tuners import bench
from tests.tuners.bench import quiet

METHODS = ("cmlora", "switch", "composite")
THEIRS: dict[str, dict[str, Any]] = {name: {"r": 2} for name in ("lora", "rslora", "loha", "lokr")}
NAMES = [name for name in TUNERS if name in bench.OPTIONS or name in THEIRS]
FEW = ("nola", "vera", "pissa", "hydra", "snell", "s2ft", "lost", "oft", "ia3", "lora", "lokr")
PAIRS = [(name, METHODS[number % 3]) for number, name in enumerate(FEW)]
REST = [(name, method) for name in NAMES for method in METHODS if (name, method) not in PAIRS]


def pipeline() -> Any:
    pipe = tiny.sd15(channels=(8, 16), layers_per_block=1)
    tiny.add_loras(pipe, ["cat", "hat"])
    return pipe


def check(name: str, method: str) -> None:
    # What changes biases cannot be exported, and attention projections have none.
    targets = ["to_q"] if name in ("hydra", "ia3") else ["to_q", "conv1"]
    config = (
        TUNERS[name].object.settings(target_modules=targets, **THEIRS[name])
        if name in THEIRS
        else bench.settings(name, targets)
    )
    pipe, other = pipeline(), pipeline()
    with quiet():
        pipe.unet.add_adapter(config, "ink")
    pipe.unet.set_adapters("ink")
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in pipe.unet.named_parameters():
            if ".ink" in key and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    lora, error = to_lora(pipe, "ink")
    assert error < 1e-5
    insert(other, lora, "ink")
    turns: dict[str, Any] = {"tau": 1} if method == "switch" else {}
    weights = {"ink": 0.9, "cat": 0.8, "hat": 1.0}
    pictures = []
    for each in (pipe, other):
        with cmlora.compose(each, weights, method=method, **turns):
            pictures.append(tiny.run(each, steps=3))
    torch.testing.assert_close(*pictures, rtol=1e-3, atol=1e-3)
    with cmlora.compose(other, {"cat": 0.8, "hat": 1.0}, method=method, **turns):
        assert not torch.allclose(tiny.run(other, steps=3), pictures[1], atol=1e-2)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_the_picture_is_that_of_the_exported_lora(name: str, method: str) -> None:
    check(name, method)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), REST)
def test_the_picture_is_so_with_every_method(name: str, method: str) -> None:
    check(name, method)
