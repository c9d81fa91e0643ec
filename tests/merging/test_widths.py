"""How many units of two models are kept side by side, by a share or by a budget."""

import itertools
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from cmlora.adapters.merging.models import merge_models
from cmlora.adapters.merging.rebasin import match
from cmlora.adapters.merging.units import rows, units_of
from cmlora.adapters.merging.widths import by_budget, by_share
from cmlora.errors import CmloraError


class Pair(nn.Module):
    """Two feed-forwards, one after the other."""

    def __init__(self, seed: int, apart: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.near, self.far = FeedForward(8, mult=3), FeedForward(8, mult=2)
        torch.manual_seed(seed)
        for part, noise in ((self.near, 0.02), (self.far, apart)):
            for parameter in part.parameters():
                parameter.data += noise * parameter.std() * torch.randn_like(parameter)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.far(x + self.near(x))
        return result


def states(model: nn.Module, other: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first, second = dict(model.state_dict()), dict(other.state_dict())
    return first, match(first, second, units_of(model)).state


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("budget", [1.0, 1.1, 1.25, 1.6, 2.0, 9.0])
def test_a_budget_is_kept_and_spent_where_it_pays(budget: float) -> None:
    model, other = Pair(1, 1.0), Pair(2, 1.0)
    found = merge_models(model, other, budget=budget)
    size = numbers(found.model)
    assert size <= budget * numbers(model)
    unit = 27  # two rows of 8 with their biases, and a column of 8, with its share of nothing
    if budget < 2:
        assert size > budget * numbers(model) - unit
    near, far = (found.widths.get(name, (0, 0))[1] for name in ("near", "far"))
    if budget <= 1.25:
        assert near == 0  # those match
        assert far > 16 or budget == 1.0
    if budget >= 2:
        assert (near, far) == (48, 32)


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_the_greedy_choice_is_the_best_of_all(seed: int) -> None:
    """With one price per block and few units, against every choice there is."""
    torch.manual_seed(seed)
    model = FeedForward(3, mult=2).eval()
    other = FeedForward(3, mult=2).eval()
    first, second = states(model, other)
    units = units_of(model)
    (own,) = units
    kind = own.kinds[0]
    loss = sum(
        (rows(first, p, kind.size) - rows(second, p, kind.size)).square().sum(1)
        for p in kind.places
    )
    assert isinstance(loss, Tensor)
    price = sum(rows(first, p, kind.size).shape[1] for p in kind.places)
    budget = 1 + 2.5 * price / numbers(model)
    kept = by_budget(first, second, units, budget)[own.name].tolist()
    best = max(
        itertools.combinations(range(kind.size), 2), key=lambda c: float(loss[list(c)].sum())
    )
    assert kept == list(best)


def test_a_budget_fits_better_than_the_same_share_everywhere() -> None:
    model, other = Pair(1, 1.0), Pair(2, 1.0)
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = (model(x) + other(x)) / 2
        errors, sizes = [], []
        ways: tuple[dict[str, Any], ...] = ({"separate": 0.25}, {"budget": 1.25})
        for given in ways:
            found = merge_models(model, other, [lambda m: m(x)], **given)
            sizes.append(numbers(found.model))
            errors.append(float((found.model(x) - wanted).square().mean()))
    assert sizes[1] <= 1.25 * numbers(model)
    assert errors[1] < errors[0]


def test_shares_are_of_every_block() -> None:
    model, other = Pair(1, 0.5), Pair(2, 0.5)
    kept = by_share(*states(model, other), units_of(model), 0.5)
    assert sorted(len(units) for units in kept.values()) == [8, 12]
    assert by_share(*states(model, other), units_of(model), 0.0) == {}


def test_equal_models_need_no_room() -> None:
    model = Pair(1, 0.5)
    assert by_budget(*states(model, model), units_of(model), 2.0) == {}


@pytest.mark.parametrize("budget", [0.9, float("nan"), -1.0])
def test_budgets_that_make_no_sense(budget: float) -> None:
    model = Pair(1, 0.5)
    with pytest.raises(CmloraError, match="expected 1"):
        merge_models(model, model, budget=budget)
    with pytest.raises(CmloraError, match="give one"):
        merge_models(model, model, budget=1.5, separate=0.5)
