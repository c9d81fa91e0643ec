"""Methods whose ranks are nested: cut to any rank, the rest still stands."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmlora.adapters.tuners import dylora, maestro
from cmlora.errors import CmloraError
from tests.tuners import bench


def test_dylora_cut_to_a_rank_is_the_lora_of_that_rank() -> None:
    model = bench.adapt("dylora", "linear", alpha=6)
    bench.shake(model)
    layer: Any = bench.layers(model)[0]
    up, down = layer.tensor("a", "up"), layer.tensor("a", "down")
    for cut in (1, 2, 4):
        dylora.set_rank(model, "a", cut)
        expected = 6 / cut * up[:, :cut] @ down[:cut]
        assert torch.allclose(bench.delta(layer), expected, atol=1e-5)
    ranks = {dylora.draw_rank(model, "a", torch.Generator().manual_seed(n)) for n in range(30)}
    assert ranks == {1, 2, 3, 4}
    with pytest.raises(CmloraError, match="between 1 and 4"):
        dylora.set_rank(model, "a", 5)


def test_dylora_frozen_trains_the_last_rank_only() -> None:
    model = bench.adapt("dylora", "linear", frozen=True)
    bench.shake(model)
    layer: Any = bench.layers(model)[0]
    dylora.set_rank(model, "a", 3)
    model(bench.data(layer.base_layer)).square().sum().backward()
    touched = layer.cmdylora_down["a"].grad.abs().sum(1) > 0
    assert touched.tolist() == [False, False, True, False]


def test_maestro_recovers_the_svd_on_a_linear_target() -> None:
    model = bench.adapt("maestro", "linear", r=8, alpha=None)
    bench.shake(model)
    layer: Any = bench.layers(model)[0]
    target = torch.randn(12, 8, generator=torch.Generator().manual_seed(5)) @ torch.diag(
        torch.tensor([3, 2, 1.5, 1, 0.7, 0.5, 0.3, 0.2])
    )
    optimizer = torch.optim.LBFGS(
        [p for p in layer.parameters() if p.requires_grad],
        max_iter=800,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def errors() -> list[Tensor]:
        found = []
        for cut in range(1, 9):
            layer.set_rank("a", cut)
            found.append((layer.update("a") - target).square().sum())
        return found

    def closure() -> float:
        optimizer.zero_grad()
        loss = torch.stack(errors()).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    best = torch.linalg.svdvals(target).square().flip(0).cumsum(0).flip(0)[1:]
    for error, least in zip(errors()[:-1], best, strict=True):
        assert float(error) <= 1.01 * float(least) + 1e-3


def test_maestro_cuts_one_layer_and_orders_importance() -> None:
    model = nn.Sequential(bench.base("linear"), bench.base("wide"))
    bench.inject(model, bench.settings("maestro", ["0", "1"]), "a")
    bench.shake(model)
    seen = set()
    for number in range(40):
        layer, cut = maestro.draw_layer(model, "a", torch.Generator().manual_seed(number))
        seen.add((layer, cut))
        ranks = [found.state["a"] for found in bench.layers(model)]
        assert ranks[layer] == cut
        assert ranks[1 - layer] == 4
    assert seen == set(itertools.product((0, 1), (1, 2, 3, 4)))
    first: Any = bench.layers(model)[0]
    importance = first.importance("a").tolist()
    assert importance == sorted(importance, reverse=True)
    up, down = first.tensor("a", "up"), first.tensor("a", "down")
    expected = sum(up[:, b:].norm() + down[b:].norm() for b in range(4))
    assert torch.isclose(first.penalty("a"), expected)
    assert float(maestro.penalty(model, "a")) > float(expected)


def test_dylora_cut_short_beats_an_ordinary_lora_cut_short() -> None:
    random = torch.Generator().manual_seed(4)
    target = torch.randn(12, 8, generator=random)
    errors: dict[str, list[float]] = {}
    for name, least in (("dylora", 1), ("lora", 4)):
        model = bench.adapt("dylora", "linear", r=4, alpha=None)
        layer: Any = bench.layers(model)[0]
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(300):
            dylora.set_rank(model, "a", int(torch.randint(least, 5, (), generator=random)))
            optimizer.zero_grad()
            torch.autograd.backward((layer.get_delta_weight("a") - target).square().mean())
            optimizer.step()
        errors[name] = []
        for rank in range(1, 5):
            dylora.set_rank(model, "a", rank)
            delta = layer.get_delta_weight("a").detach()
            errors[name].append(float((delta - target).norm()))
    assert all(a > b for a, b in itertools.pairwise(errors["dylora"]))
    assert all(a < b for a, b in zip(errors["dylora"][:3], errors["lora"][:3], strict=True))
    values = torch.linalg.svdvals(target)
    for rank, found in enumerate(errors["dylora"], 1):  # and comes near the best of its rank
        assert found < 1.5 * float(values[rank:].norm())
