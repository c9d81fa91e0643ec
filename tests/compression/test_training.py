"""Methods that train: pruning towards low rank, and factors that are best at every rank."""

import pytest
import torch
from torch import Tensor, nn

from cmlora.adapters.compression import COMPRESSIONS
from cmlora.adapters.compression.energy import least
from cmlora.adapters.compression.heal import Call
from cmlora.adapters.compression.layers import matrix_of
from cmlora.adapters.compression.maestro import cut, factored, nest
from cmlora.adapters.compression.model import compress, relative_error
from cmlora.adapters.compression.trp import prune, pruned
from cmlora.errors import CmloraError


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(matrix: Tensor) -> nn.Sequential:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight.data = matrix.clone()
    return nn.Sequential(layer)


def test_the_slope_is_that_of_the_nuclear_norm() -> None:
    matrix, direction = random(9, 7).double(), random(9, 7, seed=1).double()
    _, slope, rank = pruned(matrix, 1.0)
    assert rank == 7

    def norm(t: float) -> float:
        return float(torch.linalg.svdvals(matrix + t * direction).sum())

    expected = (norm(1e-5) - norm(-1e-5)) / 2e-5
    assert float((slope * direction).sum()) == pytest.approx(expected, abs=1e-4)


def test_the_least_rank_with_the_energy() -> None:
    matrix = random(12, 10).double()
    low, _, rank = pruned(matrix, 0.9)
    whole = float(matrix.square().sum())
    assert float(low.square().sum()) >= 0.9 * whole
    values = torch.linalg.svdvals(matrix).square()
    assert float(values[: rank - 1].sum()) < 0.9 * whole


def test_training_with_pruning_ends_at_a_lower_rank() -> None:
    truth = random(16, 3) @ random(3, 16, seed=1)
    x = random(64, 16, seed=2)
    y = x @ truth.T + 0.3 * random(64, 16, seed=3)
    ends = []
    for pruning in (False, True):
        model = linear(0.3 * random(16, 16, seed=4))
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            torch.autograd.backward(loss)
            if pruning:
                prune(model, 0.995, 1e-3)
            optimizer.step()
        values = torch.linalg.svdvals(matrix_of(model[0]).double())
        loss = (x @ (matrix_of(model[0]) - truth).T).square().mean()
        ends.append((least(values, 0.9999), float(loss)))
    (rank, error), (pruned_rank, pruned_error) = ends
    assert pruned_rank <= 0.7 * rank
    assert pruned_error <= 1.05 * error


def test_what_pruning_leaves_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    assert prune(model) == {}
    torch.autograd.backward(model(random(1, 4, 8, 8)).sum())
    assert set(prune(model)) == {"1"}
    with pytest.raises(CmloraError, match="share of energy"):
        prune(model, 0.0)


def test_any_first_factors_are_the_best_of_their_rank() -> None:
    matrix = random(12, 10) * torch.logspace(0, -1, 10)
    errors = []
    for share in (0.2, 0.4, 0.6, 1.0):
        model = linear(matrix)
        compress(model, COMPRESSIONS["svd"].object, 0.95, least=2)
        (rank,) = cut(model, share).values()
        found = relative_error(matrix, matrix_of(model[0]))
        values = torch.linalg.svdvals(matrix.double()).square()
        assert found**2 == pytest.approx(float(values[rank:].sum() / values.sum()), abs=1e-5)
        errors.append(found)
    assert errors == sorted(errors, reverse=True)


def test_nested_training_repairs_the_order_of_factors() -> None:
    matrix = random(12, 9)
    original, model = linear(matrix), linear(matrix)
    compress(model, COMPRESSIONS["svd"].object, 0.95, least=2)
    layer = model[0]
    with torch.no_grad():
        for name, side in (("form_up", 1), ("form_down", 0)):
            layer.get_parameter(name).copy_(layer.get_parameter(name).flip(side))
    calls: list[Call] = [lambda m: m(torch.eye(9))]
    before = _errors(model, matrix)
    nest(model, original, calls, steps=1500, rate=1e-2)
    nest(model, original, calls, steps=1500, rate=1e-3)
    after = _errors(model, matrix)
    values = torch.linalg.svdvals(matrix.double()).square()
    best = [float((values[b:].sum() / values.sum()).sqrt()) for b in range(1, len(after) + 1)]
    assert max(a / b for a, b in zip(after, best, strict=True)) < 1.05
    assert sum(after) - sum(best) < 0.1 * (sum(before) - sum(best))
    assert not any(p.requires_grad for p in layer.parameters())


def test_the_group_lasso_empties_the_last_factors() -> None:
    matrix = random(12, 9)
    original, model = linear(matrix), linear(matrix)
    compress(model, COMPRESSIONS["svd"].object, 0.95, least=2)
    layer = model[0]
    last = float(layer.get_parameter("form_up")[:, -1].norm())
    nest(model, original, [lambda m: m(torch.eye(9))], steps=100, rate=1e-2, group=0.05)
    assert float(layer.get_parameter("form_up")[:, -1].norm()) < 0.7 * last


def test_what_cannot_be_nested() -> None:
    model = linear(random(4, 4))
    assert factored(model) == {}
    with pytest.raises(CmloraError, match="no factored"):
        cut(model, 0.5)
    with pytest.raises(CmloraError, match="nesting needs"):
        nest(model, model, [lambda m: m(torch.eye(4))])
    compress(model, COMPRESSIONS["svd"].object, 0.6, least=2)
    with pytest.raises(CmloraError, match="share of the rank"):
        cut(model, 0.0)


def _errors(model: nn.Sequential, matrix: Tensor) -> list[float]:
    up, down = (model[0].get_parameter(f"form_{name}").detach() for name in ("up", "down"))
    widths = range(1, len(down) + 1)
    return [relative_error(matrix, up[:, :b] @ down[:b]) for b in widths]
