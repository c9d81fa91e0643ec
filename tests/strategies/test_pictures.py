"""Every method carried out by the engine on a tiny real pipeline."""

from typing import Any

import pytest
import torch

from cmlora.caching.policy import parse, tally
from cmlora.compose import compose
from cmlora.plan import Member
from cmlora.strategies import METHODS, schedule
from tests import tiny

NAMES = ["a", "b", "c"]
STEPS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "lorahub": {"coefficients": (0.5, 1.0, -0.5)},
}
with_loras = pytest.mark.parametrize("method", [method for method in METHODS if method != "naive"])


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = tiny.sd15()
    tiny.add_loras(pipe, NAMES)
    return pipe


def picture(
    pipe: Any, loras: Any, method: str, *, steps: int = STEPS, **options: Any
) -> torch.Tensor:
    with compose(pipe, loras, method=method, **options):
        return tiny.run(pipe, steps=steps)


def plain(pipe: Any, name: str, weight: float) -> torch.Tensor:
    """The stock pipeline with one LoRA, by diffusers' own means."""
    pipe.set_adapters([name], [weight])
    return tiny.run(pipe, steps=STEPS)


@with_loras
def test_one_lora_is_the_stock_pipeline(pipe: Any, method: str) -> None:
    assert torch.equal(picture(pipe, {"b": 0.7}, method), plain(pipe, "b", 0.7))


def test_no_lora_is_the_stock_pipeline(pipe: Any) -> None:
    bare = tiny.run(tiny.sd15(), steps=STEPS)
    assert torch.equal(picture(pipe, NAMES, "naive"), bare)


@with_loras
def test_loras_of_strength_zero_are_the_base_model(pipe: Any, method: str) -> None:
    options = OPTIONS.get(method, {})
    zero = picture(pipe, dict.fromkeys(NAMES, 0.0), method, steps=3, **options)
    torch.testing.assert_close(zero, picture(pipe, [], "naive", steps=3), rtol=1e-4, atol=1e-5)


def test_weight_one_without_cache_is_composite_to_the_bit(pipe: Any) -> None:
    ours = picture(pipe, NAMES, "cmlora", dominance=1.0)
    assert torch.equal(ours, picture(pipe, NAMES, "composite"))


def test_every_method_makes_another_picture(pipe: Any) -> None:
    """But for those that differ only by what nobody has measured here."""
    alike = [
        {"switch", "switch_a", "w_switch", "freeswitch"},
        {"gate", "auto"},
        {"composite", "w_composite"},
    ]
    roles: Any = {"a": "low"}
    made = {
        method: picture(pipe, NAMES, method, steps=3, roles=roles, **OPTIONS.get(method, {}))
        for method in METHODS
    }
    for method, ours in made.items():
        assert ours.isfinite().all()
        for other, theirs in made.items():
            if method != other and not any({method, other} <= group for group in alike):
                assert not torch.allclose(ours, theirs, atol=1e-3), (method, other)


@with_loras
@pytest.mark.parametrize("cache", [pytest.param("none", marks=pytest.mark.slow), "uniform:2"])
def test_with_profiles_the_order_of_the_loras_makes_no_difference(
    pipe: Any, method: str, cache: str
) -> None:
    if method in ("switch", "w_switch", "freeswitch"):
        pytest.skip("the order of the turns is the user's")
    members = [
        Member(name, frequency=0.3 * i, category="style" if i == 2 else None)
        for i, name in enumerate(NAMES)
    ]

    def made(order: list[int]) -> torch.Tensor:
        chosen = [members[i] for i in order]
        names = [member.name for member in chosen]
        options = OPTIONS.get(method, {})
        return picture(pipe, names, method, steps=3, cache=cache, members=chosen, **options)

    assert torch.equal(made([0, 1, 2]), made([2, 0, 1]))


@pytest.mark.parametrize(
    "cache",
    [*(pytest.param(c, marks=pytest.mark.slow) for c in ("none", "uniform:3")), "nonuniform"],
)
@pytest.mark.parametrize("method", METHODS)
def test_the_report_is_the_tally_of_the_schedule(pipe: Any, method: str, cache: str) -> None:
    options = OPTIONS.get(method, {})
    with compose(pipe, NAMES, method=method, cache=cache, **options) as composition:
        tiny.run(pipe, steps=STEPS)
    members = [Member(name) for name in NAMES]
    counted = tally(schedule(method, members, STEPS, parse(cache), **options))
    if method == "klora":  # which LoRAs a pass has depends on their weights
        assert composition.report.calls == STEPS
        return
    assert dict(composition.report.full) == counted.full
    assert dict(composition.report.light) == counted.light


def test_online_measures_loras_of_unknown_class_while_it_runs(pipe: Any) -> None:
    options: dict[str, Any] = {"cache": "uniform:2", "partition": "online"}
    with compose(pipe, NAMES, **options) as composition:
        measured = tiny.run(pipe, steps=10)
    assert composition.report.full["base"] == 3
    with compose(pipe, NAMES, roles=dict.fromkeys(NAMES, "high"), **options) as composition:
        known = tiny.run(pipe, steps=10)
    assert "base" not in composition.report.full
    assert not torch.equal(measured, known)
    with compose(pipe, NAMES, **options):
        assert torch.equal(tiny.run(pipe, steps=10), measured)


@pytest.mark.parametrize("partition", ["offline", "online", "async"])
def test_the_released_schedule_runs(pipe: Any, partition: str) -> None:
    roles: Any = {"a": "low", "b": "high", "c": "high"}
    options: dict[str, Any] = {"mode": "released", "partition": partition, "roles": roles}
    with compose(pipe, NAMES, cache="nonuniform", **options) as composition:
        assert tiny.run(pipe, steps=STEPS).isfinite().all()
    assert composition.report.light == {}
    assert composition.report.calls == len(NAMES) * STEPS
