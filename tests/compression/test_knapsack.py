"""A budget spread over layers by trying, beside every combination there is."""

from itertools import product
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cmlora.adapters.compression import COMPRESSIONS
from cmlora.adapters.compression.knapsack import Choice, knapsack
from cmlora.adapters.compression.model import compress
from cmlora.adapters.compression.rocket import rocket
from cmlora.adapters.compression.trp import steer
from cmlora.errors import CmloraError

choice = st.builds(Choice, st.integers(1, 400), st.floats(0, 1))


@settings(max_examples=40)
@given(st.lists(st.lists(choice, min_size=1, max_size=4), min_size=1, max_size=4), st.floats(0, 1))
def test_the_best_choice_within_the_budget(rows: list[list[Choice]], part: float) -> None:
    choices = {f"layer{i}": row for i, row in enumerate(rows)}
    least = sum(min(c.cost for c in row) for row in rows)
    most = sum(max(c.cost for c in row) for row in rows)
    budget = int(least + part * (most - least))
    found = knapsack(choices, budget)
    picked = [choices[name][index] for name, index in sorted(found.items())]
    assert sum(c.cost for c in picked) <= budget
    best = min(
        sum(c.loss for c in every)
        for every in product(*rows)
        # costs are rounded up to a 4000th of what is above the cheapest
        if sum(c.cost for c in every) <= budget - len(rows) * (budget - least) / 4000
    )
    assert sum(c.loss for c in picked) <= best + 1e-9


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(CmloraError, match="9 bytes are too few: the smallest forms need 10"):
        knapsack({"a": [Choice(10, 0.1), Choice(20, 0.0)]}, 9)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven() -> nn.Sequential:
    """One layer that a few directions describe, and one that needs them all."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    model[0].weight.data = random(32, 3) @ random(3, 32, seed=1) + 0.02 * random(32, 32, seed=2)
    model[1].weight.data = torch.linalg.qr(random(32, 32, seed=3))[0]
    return model


@pytest.mark.parametrize("name", ["svd", "rocket"])
def test_layers_that_need_more_get_more(name: str) -> None:
    errors, sizes = [], []
    rules: tuple[Literal["knapsack"] | None, ...] = (None, "knapsack")
    for rule in rules:
        model, method = uneven(), COMPRESSIONS[name].object
        done = compress(model, method, 0.66, rule=rule)
        lost = [done.layers[str(i)].error ** 2 if str(i) in done.layers else 0.0 for i in range(2)]
        errors.append(sum(lost))
        sizes.append(done.after)
    assert errors[1] < 0.5 * errors[0]
    assert sizes[1] <= 0.66 * 2 * 32 * 32 * 4


def test_atoms_per_code_are_a_choice() -> None:
    matrix = random(48, 32)
    counts = []
    for ratio in (1.0, 2.0, 3.0):
        form = rocket(matrix, 0.6, ratio=ratio)
        assert form is not None
        counts.append(len(form.atoms))
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_steering_towards_low_rank_makes_factoring_cheaper() -> None:
    original = nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 8))
    x = random(200, 24) * torch.logspace(0, -2, 24)
    before = [p.requires_grad for p in original.parameters()]
    errors = []
    for steps in (0, 150):
        model = nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 8))
        model.load_state_dict(original.state_dict())
        losses = steer(model, original, [lambda m: m(x)], steps, rate=3e-3, energy=0.7, weight=1e-3)
        assert len(losses) == steps
        assert [p.requires_grad for p in model.parameters()] == before
        compress(model, COMPRESSIONS["svd"].object, 0.5, least=2)
        errors.append(float((model(x) - original(x)).square().mean().detach()))
    assert errors[1] < errors[0]
    with pytest.raises(CmloraError, match="pruning needs calls"):
        steer(original, original, [])
