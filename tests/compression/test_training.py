"""Methods that train: pruning towards low rank, and factors that are best at every rank."""

import pytest
import torch
from torch import Tensor, nn

from cmlora.adapters.compression import COMPRESSIONS
from cmlora.adapters.compression.energy import least
from cmlora.adapters.compression.form import Factors, dense
from cmlora.adapters.compression.heal import Call, blocks, heal
from cmlora.adapters.compression.layers import matrix_of, wrap
from cmlora.adapters.compression.maestro import cut, drop, factored, nest
from cmlora.adapters.compression.model import compress, relative_error
from cmlora.adapters.compression.trp import SHAPES, prune, pruned, trp
from cmlora.errors import CmloraError
from tests import tiny


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


@pytest.mark.parametrize("seed", [0, 10, 20, 30])
def test_training_with_pruning_ends_at_a_lower_rank(seed: int) -> None:
    """What the inputs never reach keeps its random start, unless it is pruned."""
    reached = torch.linalg.qr(random(24, 10, seed=seed + 2))[0]
    left, right = (torch.linalg.qr(random(n, 3, seed=seed + n))[0] for n in (16, 10))
    truth = 10 * left @ right.T @ reached.T
    x = random(400, 10, seed=seed + 3) @ reached.T
    y = x @ truth.T + 0.3 * random(400, 16, seed=seed + 4)
    ends = []
    for pruning in (False, True):
        model = linear(0.4 * random(16, 24, seed=seed + 5))
        optimizer = torch.optim.SGD(model.parameters(), 2.0)
        for _ in range(100):
            optimizer.zero_grad()
            torch.autograd.backward((model(x) - y).square().mean())
            if pruning:
                prune(model, 0.9, 3e-4)
            optimizer.step()
        values = torch.linalg.svdvals(matrix_of(model[0]).double())
        ends.append((least(values, 0.99), float((model(x) - y).detach().square().mean())))
    (rank, loss), (pruned_rank, pruned_loss) = ends
    assert pruned_rank <= 0.7 * rank
    assert pruned_loss == pytest.approx(loss, rel=0.05)


def test_what_pruning_leaves_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    assert prune(model) == {}
    torch.autograd.backward(model(random(1, 4, 8, 8)).sum())
    assert set(prune(model)) == {"1"}
    with pytest.raises(CmloraError, match="share of energy"):
        prune(model, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_are_pruned_as_the_matrix_they_are_read_as(shape: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 2)))
    weight, parameter = random(6, 4, 3, 2), model.get_parameter("0.weight")
    parameter.data = weight.clone()
    torch.autograd.backward(model(random(1, 4, 8, 8)).sum())
    assert parameter.grad is not None
    slope = parameter.grad.clone()
    (rank,) = prune(model, 0.8, 0.1, shape).values()
    # The same kernel by kernel, in numpy's order of axes.
    w = weight.double().numpy()
    if shape == "nd":
        parts = [w[o].reshape(4, 6) for o in range(6)]
    else:
        order = (0, 1, 2, 3) if shape == "nc" else (1, 2, 0, 3)
        parts = [w.transpose(order).reshape(6 if shape == "nc" else 12, -1)]
    lows, slopes, ranks = zip(*(pruned(torch.from_numpy(part), 0.8) for part in parts), strict=True)
    assert rank == max(ranks)
    for part, low in zip(parts, lows, strict=True):
        assert 0.8 * (part**2).sum() <= float(low.square().sum()) < 0.999 * (part**2).sum()

    def kernel(matrices: tuple[Tensor, ...]) -> Tensor:
        if shape == "nd":
            return torch.stack([m.reshape(4, 3, 2) for m in matrices])
        (m,) = matrices
        return m.reshape(6, 4, 3, 2) if shape == "nc" else m.reshape(4, 3, 6, 2).permute(2, 0, 1, 3)

    assert torch.allclose(parameter.double(), kernel(lows), atol=1e-6)
    added = parameter.grad - slope
    assert torch.allclose(added.double(), 0.1 * kernel(slopes), atol=1e-5)
    with pytest.raises(CmloraError, match="nc, vh, nd"):
        prune(model, shape="hv")


def test_what_pruning_left_is_what_is_kept() -> None:
    u, v = torch.linalg.qr(random(20, 16))[0], torch.linalg.qr(random(16, 16, seed=1))[0]
    values = torch.tensor([3.0, 1.0, 0.2, 0.06, *[0.04] * 12])
    matrix = (u * values) @ v.T
    for keep, rank in ((0.9, 4), (0.25, 2), (1.0, 4)):
        form = trp(matrix, keep)
        assert form is not None
        assert len(form.down) == rank
        tail = float(values[rank:].norm() / values.norm())
        assert relative_error(matrix, dense(form)) == pytest.approx(tail, rel=1e-3)


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
    """From all nine factors of a matrix backwards to those of its SVD, at every width."""
    matrix = random(12, 9)
    original, model = linear(matrix), linear(matrix)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s.sqrt()
    backwards = Factors((u * root).flip(1), (root[:, None] * vh).flip(0))
    model[0] = wrap(model[0], backwards)
    calls: list[Call] = [lambda m: m(torch.eye(9))]
    before = _errors(model, matrix)
    nest(model, original, calls, steps=1500, rate=1e-2)
    nest(model, original, calls, steps=1500, rate=1e-3)
    after = _errors(model, matrix)
    values = torch.linalg.svdvals(matrix.double()).square()
    best = [float((values[b:].sum() / values.sum()).sqrt()) for b in range(1, 10)]
    assert all(b > c for b, c in zip(before[:8], best, strict=False))
    assert all(a <= 1.01 * c for a, c in zip(after[:8], best, strict=False))
    assert after[8] < 1e-3
    assert after == sorted(after, reverse=True)
    assert not any(p.requires_grad for p in model[0].parameters())


def test_the_group_lasso_empties_the_last_factors() -> None:
    matrix = random(12, 9)
    original, model = linear(matrix), linear(matrix)
    compress(model, COMPRESSIONS["svd"].object, 0.95, least=2)
    layer = model[0]
    last = float(layer.get_parameter("form_up")[:, -1].norm())
    nest(model, original, [lambda m: m(torch.eye(9))], steps=100, rate=1e-2, group=0.05)
    assert float(layer.get_parameter("form_up")[:, -1].norm()) < 0.7 * last


def test_emptied_factors_are_dropped() -> None:
    matrix = random(12, 3) @ random(3, 9, seed=1)
    original, model = linear(matrix), linear(matrix)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s.sqrt()
    up, down = u * root + 0.03 * random(12, 9, seed=2), root[:, None] * vh
    model[0] = wrap(model[0], Factors(up, down + 0.03 * random(9, 9, seed=3)))
    calls: list[Call] = [lambda m: m(torch.eye(9))]
    assert drop(model) == {}
    nest(model, original, calls, steps=1000, rate=1e-3, group=1e-4)
    assert drop(model) == {"0": 3}
    assert matrix_of(model[0]).shape == (12, 9)
    assert relative_error(matrix, matrix_of(model[0])) < 5e-3
    assert drop(model, least=1e9) == {"0": 1}


def test_healing_holds_the_largest_change_of_an_entry_down() -> None:
    matrix = random(24, 20)
    matrix[3, 4] = 9.0
    original = linear(matrix)
    # Inputs that hardly reach the entry: answers alone say little about it.
    x = random(64, 20, seed=2)
    x[:, 4] *= 1e-3
    ends = []
    for excess in (0.0, 1.0):
        model = linear(matrix)
        compress(model, COMPRESSIONS["svd"].object, 0.5, {"0": x.T @ x}, least=2)
        before = float((matrix_of(model[0]) - matrix).abs().max())
        heal(model, original, [lambda m: m(x)], 300, rate=1e-2, excess=excess, slack=0.5)
        ends.append(float((matrix_of(model[0]) - matrix).abs().max()))
    assert before > 5
    assert ends[1] < 0.5 * min(before, ends[0])


def test_blocks_of_denoisers() -> None:
    unet = tiny.unet_sd15(layers_per_block=1, channels=(8, 16))
    names = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
    assert sorted(blocks(unet)) == sorted(names)
    assert blocks(linear(random(2, 2))) == ()


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
