"""K-LoRA: the table is the published rule, computed once."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft.tuners.tuners_utils import BaseTunerLayer

from cmlora.compose import compose
from cmlora.errors import CmloraError
from cmlora.plan import Member, Strength
from cmlora.strategies import schedule
from cmlora.strategies.klora import masses, scale, table
from tests import tiny
from tests.references_strategies import klora_call, klora_gamma

RANKS = (2, 3)


def updates(seed: int, rank: int, loud: float = 1.0) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(seed)
    shapes = [(6, 5), (4, 7), (8, 8), (5, 5), (9, 4), (3, 12)]
    found = {
        f"block.{i}.to_q": chance.normal(size=(o, rank)) @ chance.normal(size=(rank, n))
        for i, (o, n) in enumerate(shapes)
    }
    found["block.0.to_q"] = found["block.0.to_q"] * loud
    return found


def mass(matrices: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """What `masses` finds, by sorting."""
    count = RANKS[0] * RANKS[1]
    rows = {name: np.sort(np.abs(m).flatten()) for name, m in matrices.items()}
    return {name: (float(r[-count:].sum()), float(r.sum())) for name, r in rows.items()}


def owner(weights: dict[str, Strength], module: str) -> list[str]:
    """Which LoRAs act in a module."""
    found = []
    for name, strength in weights.items():
        parts: Sequence[tuple[str, float]] = (
            strength if isinstance(strength, tuple) else (("", strength),)
        )
        if any(re.search(pattern, module) for pattern, _ in parts):
            found.append(name)
    return found


@pytest.mark.parametrize("loud", [1.0, 40.0])
def test_the_table_is_the_rule_call_by_call(loud: float) -> None:
    content, style = updates(0, RANKS[0], loud), updates(1, RANKS[1])
    gamma = klora_gamma(list(content.values()), list(style.values()))
    masses = {"cat": mass(content), "ink": mass(style)}
    members = [Member("cat", 0.8, mass=masses["cat"]), Member("ink", 0.6, mass=masses["ink"])]
    plans = schedule("klora", members, 50)
    rows = table(masses, ["ink"], 50)
    for step, plan in enumerate(plans):
        assert len(plan.passes) == 1
        weights = dict(plan.passes[0].weights)
        for module in content:
            expected = klora_call(
                content[module], style[module], RANKS, gamma, 1.5 * step / 50 + 0.5
            )
            name = {"content": "cat", "style": "ink"}[expected]
            assert owner(weights, module) == [name]
            assert rows[step][module] == name


def test_a_module_goes_from_subject_to_style_once() -> None:
    masses = {"cat": mass(updates(0, 2)), "ink": mass(updates(1, 3))}
    rows = table(masses, ["ink"], 200)
    for module in masses["cat"]:
        names = [row[module] for row in rows]
        assert names == sorted(names)  # cat before ink


def test_equal_loras_switch_after_a_third() -> None:
    same = mass(updates(0, 2))
    members = [Member("cat", mass=same), Member("ink", mass=same)]
    keys = [plan.passes[0].key for plan in schedule("klora", members, 30)]
    assert keys == ["cat"] * 10 + ["ink"] * 20
    unknown = [Member("cat"), Member("ink")]
    assert [plan.passes[0].key for plan in schedule("klora", unknown, 30)] == keys


def test_the_wrapped_curve_comes_back_to_the_subject() -> None:
    assert scale(0.0, 1.5, None, "wrapped") == pytest.approx(1.275)
    assert scale(0.1501, 1.5, None, "wrapped") < 0.01
    assert scale(0.9999, 1.5, None, "wrapped") == pytest.approx(1.275, abs=1e-3)
    members = [Member("cat"), Member("ink")]
    keys = [plan.passes[0].key for plan in schedule("klora", members, 100, curve="wrapped")]
    assert keys[0] == "ink"
    assert keys[20] == "cat"
    assert keys[-1] == "ink"


def test_the_style_is_told_by_its_category_or_comes_last() -> None:
    first = [Member("ink", category="style"), Member("zebra")]
    assert schedule("klora", first, 10)[0].passes[0].key == "zebra"
    assert schedule("klora", [Member("ink"), Member("zebra")], 10)[0].passes[0].key == "ink"


def test_a_module_of_one_lora_alone_is_always_its_own() -> None:
    members = [
        Member("cat", mass={"x": (1.0, 4.0), "only": (1.0, 4.0)}),
        Member("ink", mass={"x": (1.0, 4.0), "other": (9.0, 9.0)}),
    ]
    for plan in schedule("klora", members, 20):
        weights = dict(plan.passes[0].weights)
        assert owner(weights, "only") == ["cat"]
        assert owner(weights, "other") == ["ink"]
        assert len(owner(weights, "x")) == 1


def test_masses_are_those_of_the_dense_updates() -> None:
    """Linear layers and convolutions, with K the product of the ranks."""
    pipe = tiny.sd15()
    tiny.add_loras(pipe, ["cat"], rank=2)
    tiny.add_loras(pipe, ["ink"], rank=3)
    found = masses(pipe.unet, ["cat", "ink"])
    assert set(found["cat"]) == set(found["ink"])
    layers = dict(pipe.unet.named_modules())
    kinds = set()
    for path in found["cat"]:
        layer = layers[path]
        kinds.add(type(layer.get_base_layer()).__name__)
        for name, rank in (("cat", 2), ("ink", 3)):
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            dense = (3 / rank * up.flatten(1) @ down.flatten(1)).detach().abs().flatten()
            largest = dense.sort(descending=True).values[:6].sum()
            assert found[name][path] == pytest.approx(
                (float(largest), float(dense.sum())), rel=1e-4
            )
    assert kinds == {"Linear", "Conv2d"}


def test_every_layer_has_one_lora_when_it_runs() -> None:
    pipe = tiny.sd15()
    tiny.add_loras(pipe, ["cat", "ink"])
    seen: list[tuple[str, ...]] = []

    def note(layer: Any, _: Any) -> None:
        seen.append(tuple(layer.active_adapters) if not layer.disable_adapters else ())

    handles = [
        module.register_forward_pre_hook(note)
        for module in pipe.unet.modules()
        if isinstance(module, BaseTunerLayer)
    ]
    with compose(pipe, ["cat", "ink"], method="klora"):
        tiny.run(pipe, steps=2)
    for handle in handles:
        handle.remove()
    assert {len(active) for active in seen} == {1}
    assert {name for active in seen for name in active} == {"cat", "ink"}


def test_weights_out_of_reach_are_refused() -> None:
    pipe = tiny.sd15()
    tiny.add_loras(pipe, ("ink", "cat"))
    cpu_offload(pipe.unet, torch.device("cpu"))
    with pytest.raises(CmloraError, match="sequential offloading keeps out of reach"):
        compose(pipe, ["ink", "cat"], method="klora")
    with compose(pipe, ["ink", "cat"], method="merge"):
        tiny.run(pipe, steps=1)
