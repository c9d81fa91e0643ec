"""Cache policies that renew slots in turn or by what they measure, on a tiny real pipeline."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cmlora.caching.policy import tally
from cmlora.compose import compose
from cmlora.errors import CmloraError
from cmlora.plan import Member, Plan, Policy, Step
from cmlora.strategies import METHODS, schedule
from tests import tiny
from tests.references_strategies import accumulated

NAMES = ["a", "b"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = tiny.sd15()
    tiny.add_loras(made, NAMES)
    return made


@pytest.mark.parametrize(
    "cache", ["uniform:2+turns", "steps:0,3+turns+age:0.5", "uniform:3+age:0.3"]
)
@pytest.mark.parametrize("method", ["select", "cmlora"])
def test_slots_are_renewed_as_planned(pipe: Any, method: str, cache: str) -> None:
    with compose(pipe, NAMES, method=method, cache=cache) as active:
        assert tiny.run(pipe, steps=7).isfinite().all()
    counted = tally(schedule(method, [Member(name) for name in NAMES], 7, cache))
    assert dict(active.report.full) == counted.full
    assert dict(active.report.light) == counted.light


def test_no_cache_is_none(pipe: Any) -> None:
    drawn = []
    for cache in (None, "none"):
        with compose(pipe, NAMES, method="composite", cache=cache) as active:
            drawn.append(tiny.run(pipe))
        assert not active.report.light
    assert torch.equal(*drawn)
    with pytest.raises(CmloraError, match="cache 3: expected a text such as uniform:3"):
        compose(pipe, NAMES, cache=3)


def watched(step: Step, members: Sequence[Member], policy: Policy, *, seen: list[Step]) -> Plan:
    """Composite, with a note of every step."""
    seen.append(step)
    return METHODS["composite"].object(step, members, policy)


def test_a_threshold_refreshes_when_the_input_has_changed_enough(pipe: Any) -> None:
    seen: list[Step] = []
    with compose(pipe, NAMES, method=watched, cache="threshold:0.5", seen=seen) as active:
        tiny.run(pipe, steps=10)
    changes = seen[-1].changes
    assert len(changes) == 10
    assert changes[0] == 0.0
    assert [step.changes for step in seen] == [changes[: i + 1] for i in range(10)]
    samples = [step.sample for step in seen]
    for index in range(1, 10):
        before, now = samples[index - 1], samples[index]
        assert before is not None
        assert now is not None
        expected = float((now - before).abs().sum() / before.abs().sum())
        assert changes[index] == pytest.approx(expected, rel=1e-4)
    refreshes = accumulated(changes, 0.5)
    assert 1 < len(refreshes) < 10
    assert active.report.full == {"a": len(refreshes), "b": len(refreshes)}


def test_a_forecast_is_not_a_repetition(pipe: Any) -> None:
    def made(cache: str) -> torch.Tensor:
        with compose(pipe, NAMES, method="composite", cache=cache):
            return tiny.run(pipe, steps=6)

    plain, forecast = made("uniform:2"), made("uniform:2+forecast:1")
    assert forecast.isfinite().all()
    assert not torch.equal(plain, forecast)
    assert torch.equal(made("steps:0,1,2,3,4,5+forecast:2"), made("none"))
