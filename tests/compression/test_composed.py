"""LoRAs, hooks and caches on a compressed denoiser, beside the same weights in plain layers."""

import functools
from typing import Any

import pytest
import torch

from cmlora.adapters.compression import COMPRESSIONS
from cmlora.adapters.compression.layers import CompactConv2d, CompactLinear
from cmlora.adapters.compression.model import compress
from cmlora.compose import compose
from tests import tiny
from tests.composing import NAMES, state

MODES: dict[str, dict[str, Any]] = {
    "merge": {"method": "merge"},
    "fused": {"method": "composite", "execution": "fused"},
    "gate": {"method": "gate"},
    "cached": {"method": "cmlora", "cache": "nonuniform"},
    "batched": {"method": "composite", "execution": "batched"},
}


@functools.cache
def pair(method: str) -> tuple[Any, Any]:
    """A pipeline with a compressed denoiser and its twin without, with the same LoRAs.

    In double precision: on random LoRAs gate makes whole percents of the rounding of single
    precision within four steps, which would hide what is to be seen here.
    """
    small, dense = tiny.sd15(), tiny.sd15()
    done = compress(small.unet, COMPRESSIONS[method].object, 0.6, least=8)
    kinds = {type(small.unet.get_submodule(name)) for name in done.layers}
    assert kinds == {CompactLinear, CompactConv2d}
    for pipe in (small, dense):
        pipe.to(torch.float64)
    for name in done.layers:
        weight = small.unet.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        dense.unet.get_submodule(name).weight.data = weight.detach().double()
    for pipe in (small, dense):
        tiny.add_loras(pipe, NAMES)
        pipe.to(torch.float64)
    return small, dense


PAIRS = [("svd", mode) for mode in MODES] + [("rocket", "cached"), ("mxfp4", "fused")]
REST = [(method, mode) for method in ("rocket", "mxfp4") for mode in MODES]
CASES = PAIRS + [pytest.param(*c, marks=pytest.mark.slow) for c in REST if c not in PAIRS]


@pytest.mark.parametrize(("method", "mode"), CASES)
def test_pictures_are_those_of_plain_layers(method: str, mode: str) -> None:
    pictures = []
    for pipe in pair(method):
        before, adapters = tiny.run(pipe, steps=2), state(pipe)
        with compose(pipe, NAMES, **MODES[mode]) as composition:
            pictures.append(tiny.run(pipe, steps=4))
            if mode == "cached":
                assert composition.report.light
        assert torch.equal(tiny.run(pipe, steps=2), before)
        assert [repr(row) for row in state(pipe)] == [repr(row) for row in adapters]
    size = float(pictures[1].abs().max())
    close = (1e-8 if mode == "gate" else 1e-12) * size
    torch.testing.assert_close(pictures[0], pictures[1], rtol=0, atol=close)
    assert float((pictures[1] - before).abs().max()) > 0.01 * size
