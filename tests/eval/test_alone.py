"""What LoRAs draw alone as the measure of what can be kept: counted by hand."""

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "alone.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_other_noise_pairs_every_seed_with_every_other_of_its_set(script: dict[str, Any]) -> None:
    reference = {
        "character_1+style_1 0": {"character_1": True, "style_1": True},
        "character_1+style_1 1": {"character_1": False, "style_1": True},
        "character_1+style_1 2": {"character_1": True, "style_1": False},
        "object_1+style_1 0": {"object_1": True, "style_1": True},
    }
    cases = script["itself"](reference)
    assert len(cases) == 3 * 2 * 2
    assert {case.place for case in cases} == {"character_1+style_1"}
    kept = [case for case in cases if case.alone]
    by_category = {
        name: [case.drawn for case in kept if case.category == name]
        for name in ("character", "style")
    }
    assert sorted(by_category["character"]) == [False, False, True, True]
    assert sorted(by_category["style"]) == [False, False, True, True]
    assert sum(case.drawn for case in cases) == sum(case.alone for case in cases)


def test_a_share_counts_cases_and_its_interval_is_over_sets(script: dict[str, Any]) -> None:
    case, share = script["Case"], script["share"]
    same = [case(f"set {i}", "style", k < 3, True) for i in range(9) for k in range(4)]
    assert share(same, lambda c: c.drawn) == "0.750 [0.750, 0.750]"
    apart = [case(f"set {i}", "style", i % 2 == 0, True) for i in range(10) for _ in range(4)]
    value, low, high = share(apart, lambda c: c.drawn).replace("[", "").strip("]").split(" ")
    assert value == "0.500"
    assert float(low.strip(",")) < 0.35
    assert float(high) > 0.65
    assert share([], lambda c: c.drawn) == "-"
