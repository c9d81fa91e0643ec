"""LoRAs that share the places of every layer, against a loop over single places."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from cmlora.compose import compose
from cmlora.gating import gateable
from cmlora.plan import Gate, Member, Pass, Plan
from cmlora.strategies import schedule
from cmlora.switching import AdapterSwitch
from tests import tiny
from tests.composing import NAMES, interrupt_after, pipeline, state
from tests.references_strategies import softmax

GATE = Gate(strength=1.3, sharpness=8.0, everywhere=("c",))


class Net(nn.Module):
    """A linear layer over tokens, one over a vector, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(6, 5)
        self.vector = nn.Linear(6, 4)
        self.conv = nn.Conv2d(6, 4, 3, padding=1)


def net(**settings: Any) -> Net:
    torch.manual_seed(0)
    model = Net()
    for rank, name in enumerate(("a", "b", "c"), 2):
        config = LoraConfig(
            r=rank, lora_alpha=3, target_modules=["tokens", "vector", "conv"], **settings
        )
        inject_adapter_in_model(config, model, adapter_name=name)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(std=0.5)
    return model.eval()


def expected(layer: Any, x: torch.Tensor, weights: dict[str, float], gate: Gate) -> np.ndarray:
    """Place by place, from each LoRA's own contribution; places last but for channels."""
    base = layer.base_layer(x).movedim(1, -1) if x.ndim == 4 else layer.base_layer(x)
    result: np.ndarray = base.detach().double().numpy().copy()
    updates = {}
    for name, weight in weights.items():
        delta = layer.get_delta_weight(name).detach() / layer.scaling[name]
        scale = weight * layer.lora_alpha[name] / layer.r[name]
        if x.ndim == 4:
            out = torch.nn.functional.conv2d(x, delta, padding=1).movedim(1, -1)
        else:
            out = x @ delta.T
        updates[name] = (out * scale).detach().double().numpy()
    local = [name for name in sorted(updates) if name not in gate.everywhere]
    for name in set(updates) - set(local):
        result += updates[name]
    for b in range(len(result)):
        places = list(np.ndindex(result.shape[1:-1]))
        size = {
            n: {p: math.sqrt(sum(v * v for v in updates[n][(b, *p)])) for p in places}
            for n in local
        }
        usual = {n: sum(size[n].values()) / len(places) for n in local}
        for p in places:
            shares = softmax([gate.sharpness * size[n][p] / (usual[n] or 1.0) for n in local])
            for name, share in zip(local, shares, strict=True):
                result[(b, *p)] += gate.strength * share * updates[name][(b, *p)]
    return result


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("layer", ["tokens", "vector", "conv"])
def test_every_place_is_shared_out_as_the_formula_says(
    layer: str, silent: bool, fused: bool
) -> None:
    model = net()
    if silent:  # a LoRA that was never trained in this layer
        getattr(model, layer).lora_B["b"].weight.data.zero_()
    inner: Any = getattr(model, layer)
    shape = {"tokens": (2, 7, 6), "vector": (3, 6), "conv": (2, 6, 4, 5)}[layer]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x[-1] = 0  # as the embeddings of a prompt that is left out are
    weights = {"a": 1.0, "b": 0.6, "c": 0.8}
    wanted = expected(inner, x, weights, GATE)
    switch = AdapterSwitch(model, fused=fused)
    switch.activate(weights, GATE)
    with torch.no_grad():
        found = inner(x)
        if x.ndim == 4:
            found = found.movedim(1, -1)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)
        switch.activate({"a": 1.0})
        alone = inner(x)
        AdapterSwitch(net()).activate({"a": 1.0})
    assert "forward" not in vars(inner)
    assert not torch.allclose(alone if x.ndim < 4 else alone.movedim(1, -1), found)


@pytest.mark.parametrize("layer", ["tokens", "vector", "conv"])
@pytest.mark.parametrize("how", ["offloaded by layers", "moved after its activation"])
def test_a_model_may_be_offloaded(layer: str, how: str) -> None:
    model, weights = net(), {"a": 1.0, "b": 0.6, "c": 0.8}
    shape = {"tokens": (2, 7, 6), "vector": (3, 6), "conv": (2, 6, 4, 5)}[layer]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    wanted = expected(getattr(model, layer), x, weights, GATE)
    if how == "offloaded by layers":
        cpu_offload(model, execution_device=torch.device("cpu"))
        AdapterSwitch(model).activate(weights, GATE)
    else:
        values = model.state_dict()
        model.to("meta")
        AdapterSwitch(model).activate(weights, GATE)
        model.load_state_dict(values, assign=True)
    with torch.no_grad():
        found = getattr(model, layer)(x)
    found = found.movedim(1, -1) if x.ndim == 4 else found
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["tokens", "conv"])
def test_half_precision_is_near(layer: str) -> None:
    shape = {"tokens": (2, 7, 6), "conv": (2, 6, 4, 5)}[layer]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    answers = []
    for dtype in (torch.float32, torch.bfloat16):
        model = net().to(dtype)
        AdapterSwitch(model).activate({"a": 1.0, "b": 0.6, "c": 0.8}, GATE)
        with torch.no_grad():
            answers.append(getattr(model, layer)(x.to(dtype)))
    assert answers[1].dtype == torch.bfloat16
    torch.testing.assert_close(answers[1].float(), answers[0], rtol=0.05, atol=0.1)


def test_strengths_that_change_do_not_pile_up_copies() -> None:
    switch = AdapterSwitch(net())
    for step in range(20):
        switch.activate({"a": 1.0, "b": step / 20, "c": 1.0}, GATE)
    assert len(switch._activations) == 1


def test_one_local_lora_acts_as_it_is() -> None:
    model = net()
    switch, x = AdapterSwitch(model), torch.randn(2, 7, 6)
    with torch.no_grad():
        switch.activate({"a": 0.7, "b": 0.0, "c": 1.0}, GATE)
        gated = model.tokens(x)
        switch.activate({"a": 0.7, "c": 1.0})
        assert torch.equal(gated, model.tokens(x))


def test_layers_that_are_no_plain_loras_add_up() -> None:
    model = net(use_dora=True)
    assert not any(map(gateable, AdapterSwitch(model).layers))
    switch, x = AdapterSwitch(model), torch.randn(2, 7, 6)
    with torch.no_grad():
        switch.activate({"a": 1.0, "b": 1.0}, GATE)
        gated = model.tokens(x)
        switch.activate({"a": 1.0, "b": 1.0})
        assert torch.equal(gated, model.tokens(x))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("failing", [False, True])
def test_nothing_is_left_behind(family: str, failing: bool) -> None:
    pipe = pipeline(family)
    before, adapters = tiny.run(pipe), state(pipe)
    composition = compose(pipe, NAMES, method="gate", cache="uniform:2")
    if failing:
        with pytest.raises(KeyboardInterrupt), composition:
            tiny.run(pipe, callback_on_step_end=interrupt_after(1))
    else:
        with composition:
            gated = tiny.run(pipe)
        with compose(pipe, NAMES, method="merge"):
            assert not torch.allclose(tiny.run(pipe), gated, atol=1e-3)
    assert state(pipe) == adapters
    assert torch.equal(tiny.run(pipe), before)


def test_a_style_is_added_everywhere() -> None:
    """Of one style and one other LoRA nothing is selected: it is a merge with a weaker style."""
    pipe = pipeline("sd15")
    pictures = []
    for method, weight in (("gate", 0.8), ("merge", 0.7 * 0.8)):
        members = [Member("ink", weight, category="style"), Member("alice", 1.1)]
        with compose(pipe, ["ink", "alice"], members=members, method=method, text_encoder="none"):
            pictures.append(tiny.run(pipe, steps=2))
    assert torch.equal(*pictures)


@pytest.mark.parametrize(
    ("categories", "weights"),
    [
        (("style", None, None), (0.35, 1.0, 1.0)),
        (("style", "style", "style"), (0.5, 1.0, 1.0)),  # nobody is left to make room for
        ((None, None, None), (0.5, 1.0, 1.0)),
    ],
)
def test_a_style_makes_room(categories: tuple[str | None, ...], weights: tuple[float, ...]) -> None:
    members = [
        Member(name, weight, category=category)
        for name, weight, category in zip("abc", (0.5, 1.0, 1.0), categories, strict=True)
    ]
    (plan,) = schedule("gate", members, 1)
    assert tuple(plan.passes[0].weights.values()) == pytest.approx(weights)
    (plan,) = schedule("gate", members, 1, common=1.0)
    assert tuple(plan.passes[0].weights.values()) == (0.5, 1.0, 1.0)


def test_a_gate_of_equal_shares_is_a_mean() -> None:
    """Sharpness 0 weighs all alike, so strength N is the plain merge."""
    pipe = pipeline("sd15")
    with compose(pipe, NAMES, method="gate", sharpness=0.0, strength=float(len(NAMES))):
        mean = tiny.run(pipe, steps=2)
    with compose(pipe, NAMES, method="merge"):
        torch.testing.assert_close(mean, tiny.run(pipe, steps=2), rtol=1e-4, atol=1e-4)


def test_gated_passes_are_one_pass() -> None:
    pipe = pipeline("sd15")

    def two(step: Any, members: Any, policy: Any) -> Plan:
        everyone = {member.name: member.weight for member in members}
        return Plan((Pass(everyone), Pass(everyone, gate=Gate(1.0, 4.0))), (0.5, 0.5))

    for execution in ("sequential", "fused"):
        with compose(pipe, NAMES, method=two, execution=execution) as composition:
            tiny.run(pipe, steps=2)
        assert sum(composition.report.full.values()) == 4


@pytest.mark.parametrize("execution", ["sequential", "batched", "fused"])
@pytest.mark.parametrize("method", ["gate", "merge", "composite"])
def test_the_scale_that_pipelines_take_counts(method: str, execution: Any) -> None:
    pipe = pipeline("sd15")

    def draw(weight: float, **options: Any) -> torch.Tensor:
        loras = dict.fromkeys(NAMES, weight)
        with compose(pipe, loras, method=method, execution=execution, text_encoder="none"):
            return tiny.run(pipe, steps=2, **options)

    whole = draw(1.0)
    half = draw(1.0, cross_attention_kwargs={"scale": 0.5})
    torch.testing.assert_close(half, draw(0.5), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(half, whole, atol=1e-3)
    assert torch.equal(draw(1.0, cross_attention_kwargs={"scale": 1.0}), whole)
