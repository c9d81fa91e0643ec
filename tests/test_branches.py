"""The engine's part in shared branches, recalled outputs and comparisons with the step before."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from cmlora.branches import share_uncond
from cmlora.caching.policy import parse, tally
from cmlora.compose import compose
from cmlora.plan import Member, Pass, Plan, Policy, Step
from cmlora.schedules.apply import scheduled
from cmlora.schedules.parse import parse_schedule
from cmlora.strategies import METHODS, schedule
from tests import tiny

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    made = {"sd15": tiny.sd15, "sdxl": tiny.sdxl}[request.param]()
    tiny.add_loras(made, NAMES)
    return made


def by_hand(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
    """Composite of conditional halves on the base's unconditional one, from whole passes."""
    passes = (Pass({}), *(Pass({m.name: m.weight}) for m in members))

    def combine(outputs: torch.Tensor) -> torch.Tensor:
        half = outputs.shape[1] // 2
        return torch.cat([outputs[0, :half], outputs[1:, half:].mean(0)])

    return Plan(passes, combine)


@pytest.mark.parametrize("execution", ["sequential", "batched"])
def test_a_shared_unconditional_branch_is_the_base_models(pipe: Any, execution: Any) -> None:
    with compose(pipe, NAMES, method="composite", uncond="shared", execution=execution) as active:
        ours = tiny.run(pipe)
    assert active.report.full == {"base": 2.0, "a": 2.0, "b": 2.0, "c": 2.0}  # of four steps
    assert active.report.calls == 8
    with compose(pipe, NAMES, method=by_hand):
        torch.testing.assert_close(ours, tiny.run(pipe), rtol=1e-4, atol=1e-4)
    with compose(pipe, NAMES, method="composite"):
        assert not torch.allclose(ours, tiny.run(pipe), atol=1e-3)


def test_a_base_pass_serves_with_both_its_halves(pipe: Any) -> None:
    with compose(pipe, NAMES, method="select", uncond="shared", sharpness=0, strength=1) as active:
        ours = tiny.run(pipe)
    assert active.report.full == {"base": 4, "a": 2.0, "b": 2.0, "c": 2.0}
    with compose(pipe, NAMES, method=by_hand):
        torch.testing.assert_close(ours, tiny.run(pipe), rtol=1e-4, atol=1e-4)


def test_without_guidance_there_is_nothing_to_share(pipe: Any) -> None:
    with compose(pipe, NAMES, method="composite", uncond="shared") as active:
        ours = tiny.run(pipe, guidance_scale=1.0)
    assert active.report.full == {"a": 4, "b": 4, "c": 4}
    with compose(pipe, NAMES, method="composite"):
        torch.testing.assert_close(ours, tiny.run(pipe, guidance_scale=1.0))


def test_one_pass_is_not_taken_apart(pipe: Any) -> None:
    with compose(pipe, NAMES, method="merge", uncond="shared"):
        ours = tiny.run(pipe)
    with compose(pipe, NAMES, method="merge"):
        assert torch.equal(ours, tiny.run(pipe))


@pytest.mark.parametrize("method", ["composite", "select", "loratorio", "multlfg", "cmlora"])
def test_shared_passes_are_counted_as_planned(pipe: Any, method: str) -> None:
    if pipe.__class__.__name__.endswith("XLPipeline"):
        pytest.skip("counted once")
    with compose(pipe, NAMES, method=method, uncond="shared", cache="uniform:2") as active:
        assert tiny.run(pipe, steps=5).isfinite().all()
    plans = schedule(method, [Member(name) for name in NAMES], 5, "uniform:2")
    counted = tally([share_uncond(plan) for plan in plans])
    assert dict(active.report.full) == counted.full
    assert dict(active.report.light) == counted.light


def remembering(step: Step, members: Sequence[Member], policy: Policy, *, kept: Any) -> Plan:
    """`delta` with every pass fresh and the differences carried along by hand."""
    plan = METHODS["delta"].object(step, members, policy)
    known = plan.combine

    def combine(outputs: torch.Tensor) -> torch.Tensor:
        assert not isinstance(known, tuple)
        rows = outputs.clone()
        for i, item in enumerate(plan.passes):
            if item.recall:
                rows[i] = rows[0] + (kept["rows"][i] - kept["rows"][0])
        kept["rows"] = rows
        return known(rows)

    return Plan(tuple(Pass(item.weights) for item in plan.passes), combine)


def test_recalled_outputs_follow_the_first_pass(pipe: Any) -> None:
    with compose(pipe, NAMES, method="delta") as active:
        ours = tiny.run(pipe, steps=7)
        again = tiny.run(pipe, steps=7)
    assert torch.equal(ours, again)  # nothing of a run is left for the next one
    assert active.report.full == {"a+b+c": 7, "base": 2, "a": 2, "b": 2, "c": 1}
    with compose(pipe, NAMES, method=remembering, kept={}):
        torch.testing.assert_close(ours, tiny.run(pipe, steps=7), rtol=1e-4, atol=1e-4)


def remembering_halves(
    step: Step, members: Sequence[Member], policy: Policy, *, kept: Any, **options: Any
) -> Plan:
    """`delta` on the base's unconditional half, from whole passes, all of them fresh."""
    plan = METHODS["delta"].object(step, members, policy, **options)
    known = plan.combine

    def combine(outputs: torch.Tensor) -> torch.Tensor:
        assert not isinstance(known, tuple)
        rows, half = outputs[:-1].clone(), outputs.shape[1] // 2
        rows[:, :half] = outputs[-1, :half]
        for i, item in enumerate(plan.passes):
            if item.recall:
                rows[i, half:] = (rows[0] + kept["rows"][i] - kept["rows"][0])[half:]
        kept["rows"] = rows
        return known(rows)

    return Plan((*(Pass(item.weights) for item in plan.passes), Pass({})), combine)


@pytest.mark.parametrize(
    "options", [{}, {"every": 4}, {"rule": "composite"}, {"anchor": "base"}], ids=str
)
def test_a_shared_branch_is_cheaper_with_recalled_outputs_too(pipe: Any, options: Any) -> None:
    calls = []
    for uncond in ("per_lora", "shared"):
        with compose(pipe, NAMES, method="delta", uncond=uncond, **options) as active:
            ours = tiny.run(pipe, steps=9)
        calls.append(active.report.calls)
    assert calls[1] < calls[0]
    plans = schedule("delta", [Member(name) for name in NAMES], 9, **options)
    assert dict(active.report.full) == tally([share_uncond(plan) for plan in plans]).full
    with compose(pipe, NAMES, method=remembering_halves, kept={}, **options):
        torch.testing.assert_close(ours, tiny.run(pipe, steps=9), rtol=1e-4, atol=1e-4)
    with compose(pipe, NAMES, method="delta", **options):
        assert not torch.allclose(ours, tiny.run(pipe, steps=9), atol=1e-3)


@pytest.mark.parametrize("uncond", ["per_lora", "shared"])
@pytest.mark.parametrize("method", ["composite", "select", "delta", "cmlora"])
@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
def test_a_lora_that_comes_back_begins_anew(
    pipe: Any, names: list[str], method: str, uncond: Any
) -> None:
    """What it left behind when it paused is neither reused nor recalled nor extrapolated from."""
    if pipe.__class__.__name__.endswith("XLPipeline"):
        pytest.skip("counted once")
    pause = "[<lora:a:1>:<lora:a:0>:<lora:a:1>:0.3,0.6]"
    options: dict[str, Any] = {"schedule": pause, "cache": "uniform:4", "uncond": uncond}
    with compose(pipe, names, method=method, **options) as active:
        tiny.run(pipe, steps=10)
    curve = scheduled(METHODS[method].object, parse_schedule(pause))
    members = [Member(name) for name in names]
    plans = [curve(Step(i, 10), members, parse("uniform:4")) for i in range(10)]
    if uncond == "shared":
        plans = [share_uncond(plan) for plan in plans]
    counted = tally(plans)
    assert (dict(active.report.full), dict(active.report.light)) == counted
    if method in ("composite", "select"):
        share = 1 if uncond == "per_lora" else 0.5
        assert active.report.full["a"] == 3 * share  # at steps 0, 6 and 8


def test_nothing_is_extrapolated_across_a_pause() -> None:
    pipe = tiny.sd15()
    tiny.add_loras(pipe, NAMES)

    def drawn(cache: str) -> torch.Tensor:
        pause = "[<lora:a:1>:<lora:a:0>:<lora:a:1>:0.25,0.5]"
        with compose(pipe, ["a"], method="merge", cache=cache, schedule=pause):
            return tiny.run(pipe, steps=12)

    # every slot has one value since it last began, and a single value is what a forecast takes
    assert torch.equal(drawn("steps:0,6+forecast:1"), drawn("steps:0,6"))


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1]])
def test_the_outputs_of_the_step_before_are_handed_on(pipe: Any, names: list[str]) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def compare(outputs: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
        seen.append((outputs.clone(), None if previous is None else previous.clone()))
        return outputs.mean(0)

    def strategy(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
        ordered = members if step.index % 2 else members[::-1]
        passes = tuple(Pass({m.name: 1.0}) for m in ordered)
        return Plan(passes, keep=True, compare=compare)

    with compose(pipe, names, method=strategy):
        tiny.run(pipe)
    assert len(seen) == 4
    assert seen[0][1] is None
    for (before, _), (_, previous) in itertools.pairwise(seen):
        assert previous is not None
        assert torch.equal(previous, before.flip(0))


def test_a_pass_that_was_not_kept_is_run() -> None:
    pipe = tiny.sd15()
    tiny.add_loras(pipe, NAMES)

    def strategy(step: Step, members: Sequence[Member], policy: Policy) -> Plan:
        second = Pass({"b" if step.index < 2 else "c": 1.0}, recall=True)
        return Plan((Pass({"a": 1.0}), second), (0.5, 0.5), keep=True)

    with compose(pipe, NAMES, method=strategy) as active:
        tiny.run(pipe, steps=4)
    assert active.report.full == {"a": 4, "b": 1, "c": 1}


def test_features_of_other_strengths_are_not_reused() -> None:
    """A curve that moves by more than a tenth since a feature was recorded makes a full pass."""
    pipe = tiny.sd15()
    tiny.add_loras(pipe, NAMES)
    options: dict[str, Any] = {"method": "composite", "cache": "steps:0"}
    with compose(pipe, NAMES, schedule="<lora:b:unet=1@0,0.5@4:ease=hold>", **options) as active:
        tiny.run(pipe, steps=8)
    assert active.report.full == {"a": 1, "b": 2, "c": 1}
    assert active.report.light == {"a": 7, "b": 6, "c": 7}
    members = [Member(name) for name in NAMES]
    curve = scheduled(METHODS["composite"].object, parse_schedule("<lora:b:1@0,0.5@4:ease=hold>"))
    plans = [curve(Step(i, 8), members, parse("steps:0")) for i in range(8)]
    assert tally(plans) == (active.report.full, active.report.light)


def test_auto_chooses_a_cache_and_says_why(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with compose(pipe, NAMES, method="auto") as active:
        shared = tiny.run(pipe, steps=10)
    assert active.reason.startswith("gate: in one pass per step")
    with compose(pipe, NAMES, method="gate"):
        assert torch.equal(tiny.run(pipe, steps=10), shared)
    layer: Any = next(m for m in pipe.unet.modules() if isinstance(m, BaseTunerLayer))
    monkeypatch.setitem(layer.lora_bias, NAMES[0], True)  # no plain LoRA any more
    with compose(pipe, NAMES, method="auto") as active:
        tiny.run(pipe, steps=10)
    assert active.reason.startswith("select with uniform:2 and a shared unconditional branch")
    assert sum(active.report.light.values()) == 5 * 2.5
    with compose(pipe, NAMES, method="select", cache="uniform:2", uncond="shared"):
        expected = tiny.run(pipe, steps=10)
    with compose(pipe, NAMES, method="auto"):
        assert torch.equal(tiny.run(pipe, steps=10), expected)
    with compose(pipe, NAMES, method="merge") as plain:
        assert plain.reason == ""
