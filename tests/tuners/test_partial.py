"""What some methods save while training: activations, gradients, bytes of coefficients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmlora.adapters.tuners import nola
from cmlora.adapters.tuners.sltrain import _Sparse
from cmlora.errors import CmloraError
from tests.tuners import bench


def kept(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What autograd keeps of a forward pass."""
    found: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return found


@pytest.mark.parametrize("kind", ["linear", "conv1", "conv3", "strided"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_s2ft_is_the_dense_update(kind: str, side: str) -> None:
    layer: Any = bench.adapted("s2ft", kind, side=side)
    x = bench.data(layer.base_layer).requires_grad_()
    dense = x.detach().clone().requires_grad_()
    ours = layer(x)
    weight = layer.base_layer.weight + layer.get_delta_weight("a")
    base = layer.base_layer
    if isinstance(base, nn.Linear):
        theirs = nn.functional.linear(dense, weight, base.bias)
    else:
        theirs = nn.functional.conv2d(dense, weight, base.bias, base.stride, base.padding)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    values = layer.held("a", "values")
    loss = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    ours_grads = torch.autograd.grad(ours, [x, values], loss)
    theirs_grads = torch.autograd.grad(theirs, [dense, values], loss)
    for one, two in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_s2ft_keeps_only_its_part_of_the_input() -> None:
    layer: Any = bench.adapted("s2ft", "linear", side="input", share=0.25)
    layer.base_layer.requires_grad_(False)
    x = bench.data(layer.base_layer).requires_grad_()
    sizes = {t.numel() for t in kept(layer, x) if t.is_floating_point()}
    assert x.numel() // 4 in sizes
    assert x.numel() not in sizes
    assert x.numel() in {t.numel() for t in kept(nn.Linear(8, 12), x)}


@pytest.mark.parametrize("chunk", [1, 50, 10_000])
def test_gradients_of_sparse_entries_come_a_few_rows_at_a_time(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmlora.adapters.tuners.sltrain._CHUNK", chunk)
    random = torch.Generator().manual_seed(0)
    places = torch.randperm(120, generator=random)[:17].sort().values
    values = torch.randn(17, generator=random, dtype=torch.double).requires_grad_()
    x = torch.randn(6, 10, generator=random, dtype=torch.double).requires_grad_()
    loss = torch.randn(6, 12, generator=random, dtype=torch.double)
    found = _Sparse.apply(x, values, places, (12, 10))
    matrix = torch.zeros(120, dtype=torch.double).index_put((places,), values).reshape(12, 10)
    expected = x @ matrix.T
    torch.testing.assert_close(found, expected)
    for one, two in zip(
        torch.autograd.grad(found, [x, values], loss),
        torch.autograd.grad(expected, [x, values], loss),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


def test_sltrain_in_place_of_the_weight() -> None:
    model = bench.adapt("sltrain", "bare", mode="replace", density=0.25)
    layer: Any = bench.layers(model)[0]
    down, up = layer.held("a", "down"), layer.held("a", "up")
    values, places = layer.held("a", "values"), layer.frozen("a", "places")
    assert down.numel() + up.numel() + values.numel() == 2 * (12 + 12) + int(0.25 * 144)
    assert not up.any()
    assert float(values.abs().max()) <= 12**-0.5
    assert float(values.abs().max()) > 0.5 * 12**-0.5
    bench.shake(model)
    sparse = torch.zeros(144).index_put((places,), values.detach()).reshape(12, 12)
    expected = layer.scaling["a"] * (up @ down).detach() + sparse
    x = bench.data(layer.base_layer)
    torch.testing.assert_close(layer(x), x @ expected.T, rtol=1e-4, atol=1e-4)
    assert int(torch.linalg.matrix_rank(expected)) > 2
    with pytest.raises(CmloraError, match="mode is 'half'"):
        bench.settings("sltrain", mode="half")


def test_nola_survives_few_bits() -> None:
    errors = {}
    for bits in (8, 4):
        model = bench.adapt("nola", "linear", down_count=64, up_count=64)
        bench.shake(model)
        layer: Any = bench.layers(model)[0]
        before = layer.get_delta_weight("a").detach()
        nola.quantise(model, "a", bits)
        after = layer.get_delta_weight("a").detach()
        errors[bits] = float((after - before).norm() / before.norm())
        assert len(layer.held("a", "up").unique()) <= 2**bits - 1
    assert errors[8] < 0.02 < errors[4] < 0.35
    with pytest.raises(CmloraError, match="1 bits, 1 NOLA layers"):
        nola.quantise(model, "a", 1)
    with pytest.raises(CmloraError, match="0 NOLA layers"):
        nola.quantise(model, "b", 8)
