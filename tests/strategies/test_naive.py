"""Naive: the base model alone."""

import pytest

from cmlora.caching.policy import parse
from cmlora.plan import Member, Pass
from cmlora.strategies import schedule


@pytest.mark.parametrize("members", [[], [Member("a")], [Member("a"), Member("b")]])
def test_the_base_model_runs_whatever_the_loras(members: list[Member]) -> None:
    refreshes = parse("uniform:3").refreshes(10)
    for index, plan in enumerate(schedule("naive", members, 10, "uniform:3")):
        assert plan.passes == (Pass({}, may_reuse=index not in refreshes),)
        assert plan.passes[0].key == "base"
