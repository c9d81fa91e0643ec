"""LoraHub: the merge with found coefficients, and the search for them."""

import math
from collections.abc import Callable
from typing import Literal

import pytest

from cmlora.errors import CmloraError
from cmlora.plan import Member, Pass
from cmlora.strategies import schedule
from cmlora.strategies.lorahub import search

Point = tuple[float, ...]
optimizers = pytest.mark.parametrize("optimizer", ["es", "nevergrad"])
GOAL = (0.8, -0.4, 0.2)


def distance(point: Point) -> float:
    return sum((value - goal) ** 2 for value, goal in zip(point, GOAL, strict=True))


def counting(objective: Callable[[Point], float]) -> tuple[Callable[[Point], float], list[Point]]:
    seen: list[Point] = []

    def counted(point: Point) -> float:
        seen.append(point)
        return objective(point)

    return counted, seen


def test_coefficients_belong_to_the_loras_sorted_by_name() -> None:
    members = [Member("b", 0.5), Member("a", 2.0)]
    plan = schedule("lorahub", members, 1, coefficients=(0.25, 3.0))[0]
    assert plan.passes == (Pass({"a": 0.5, "b": 1.5}),)


def test_without_coefficients_the_error_says_how_to_find_them() -> None:
    with pytest.raises(CmloraError, match=r"search .* one for each of a, b"):
        schedule("lorahub", [Member("b"), Member("a")], 1)


def test_one_coefficient_per_lora() -> None:
    with pytest.raises(CmloraError, match="3 coefficients for a, b"):
        schedule("lorahub", [Member("b"), Member("a")], 1, coefficients=(1, 2, 3))


@optimizers
@pytest.mark.parametrize("budget", [1, 2, 5, 40, 43])
def test_the_budget_is_spent_exactly(optimizer: Literal["es", "nevergrad"], budget: int) -> None:
    objective, seen = counting(distance)
    found = search(objective, 3, budget=budget, optimizer=optimizer)
    assert len(seen) == budget
    assert seen[0] == (0.0, 0.0, 0.0)
    assert found in seen
    assert all(abs(value) <= 1.5 for point in seen for value in point)


@optimizers
def test_the_best_point_with_its_penalty_is_returned(
    optimizer: Literal["es", "nevergrad"],
) -> None:
    objective, seen = counting(distance)
    found = search(objective, 3, budget=60, seed=3, optimizer=optimizer)

    def loss(point: Point) -> float:
        return distance(point) + 0.05 * sum(map(abs, point)) / 3

    assert loss(found) == min(map(loss, seen))
    assert loss(found) < loss((0.0, 0.0, 0.0)) / 2


@optimizers
def test_the_same_seed_gives_the_same_points(optimizer: Literal["es", "nevergrad"]) -> None:
    runs = []
    for seed in (1, 1, 2):
        objective, seen = counting(distance)
        search(objective, 3, seed=seed, optimizer=optimizer)
        runs.append(seen)
    assert runs[0] == runs[1]
    if optimizer == "es":  # NGOpt may choose a solver without chance
        assert runs[0] != runs[2]


@optimizers
def test_the_penalty_decides_where_the_objective_is_flat(
    optimizer: Literal["es", "nevergrad"],
) -> None:
    assert search(lambda _: 7.0, 2, optimizer=optimizer) == (0.0, 0.0)


@optimizers
def test_a_failed_picture_is_never_the_best(optimizer: Literal["es", "nevergrad"]) -> None:
    found = search(lambda p: math.nan if p[0] <= 0 else p[0], 1, budget=30, optimizer=optimizer)
    assert found[0] > 0


def test_bounds_hold() -> None:
    found = search(lambda p: -sum(p), 2, budget=200, bound=0.5, optimizer="es")
    assert found == (0.5, 0.5)


def test_impossible_searches_are_errors() -> None:
    for count, budget, bound in ((0, 40, 1.5), (1, 0, 1.5), (1, 40, 0.0), (1, 40, math.inf)):
        with pytest.raises(CmloraError, match="must be positive"):
            search(distance, count, budget=budget, bound=bound)
