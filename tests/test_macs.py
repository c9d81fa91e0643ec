"""Multiply-accumulates counted while a composition runs."""

from typing import Any

import pytest

from cmlora.compose import compose
from cmlora.cost import pass_macs
from tests import families
from tests.families import NAMES


def test_a_run_costs_what_was_predicted() -> None:
    sd15 = families.family("sd15")
    each = pass_macs(sd15.pipe.unet, (2, 4, 16, 16), (2, families.TOKENS, families.WIDTH))
    nobody: tuple[str, ...] = ()
    with compose(sd15.pipe, nobody, method="naive", count_macs=True) as composition:
        for _ in range(2):
            sd15.run()
            assert composition.report.macs == pytest.approx(4 * each.full, rel=0.01)
    with compose(sd15.pipe, NAMES, method="composite") as composition:
        sd15.run()
    assert composition.report.macs is None


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_reuse_saves_and_batches_cost_the_same(name: str) -> None:
    family = families.family(name)
    costs = {}
    kinds: dict[str, dict[str, Any]] = {
        "sequential": {},
        "batched": {"execution": "batched"},
        "cached": {"cache": "uniform:2"},
    }
    for label, options in kinds.items():
        with compose(
            family.pipe, NAMES, method="composite", count_macs=True, **options
        ) as composition:
            family.run()
        costs[label] = composition.report.macs or 0
    assert costs["batched"] == costs["sequential"] > costs["cached"] > 0
