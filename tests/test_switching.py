"""Switching adapters: exactly what PEFT does, and exactly undone."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from cmlora.errors import CmloraError
from cmlora.shift import wrap
from cmlora.switching import AdapterSwitch

NAMES = ("a", "b", "c")


class Net(nn.Module):
    """Three layers; every LoRA adapts two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.second(self.first(x).tanh()).tanh()
        output: torch.Tensor = self.conv(hidden.unsqueeze(-1)).squeeze(-1)
        return output


def net() -> Net:
    """A model with three LoRAs of different rank, scale and reach."""
    torch.manual_seed(0)
    model = Net()
    reach = {"a": ["first", "second"], "b": ["second", "conv"], "c": ["first", "conv"]}
    for rank, (name, targets) in enumerate(reach.items(), 1):
        config = LoraConfig(r=rank, lora_alpha=5, target_modules=targets, use_rslora=name == "c")
        inject_adapter_in_model(config, model, adapter_name=name)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.normal_()
    return model


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def state(model: nn.Module) -> list[Any]:
    """All that PEFT knows about which adapters act."""
    return [
        *(
            (
                copy.copy(vars(layer).get("_active_adapter", "class")),
                vars(layer).get("_disable_adapters", "class"),
                dict(layer.scaling),
            )
            for layer in layers(model)
        ),
        [(name, p.requires_grad) for name, p in model.named_parameters()],
    ]


WEIGHTS = st.dictionaries(st.sampled_from(NAMES), st.floats(-2, 2), max_size=3)
X = torch.linspace(-1, 1, 12).reshape(2, 6)


@torch.no_grad()
@pytest.mark.parametrize("direct", [True, False])
@settings(max_examples=25, deadline=None)
@given(weights=WEIGHTS)
def test_activation_is_what_peft_does(direct: bool, weights: dict[str, float]) -> None:
    reference, model = net(), net()
    active = sorted(name for name, weight in weights.items() if weight != 0)
    for layer in layers(reference):
        layer.set_adapter(active, inference_mode=True)
        for name in active:
            layer.set_scale(name, weights[name])
    switch = AdapterSwitch(model, direct=direct)
    switch.freeze()
    switch.activate({"a": 0.5})
    switch.activate(weights)
    assert torch.equal(model(X), reference(X))


def do_disable(model: nn.Module) -> None:
    for layer in layers(model):
        layer.enable_adapters(False)


def do_enable(model: nn.Module) -> None:
    for layer in layers(model):
        layer.enable_adapters(True)


def do_set_one(model: nn.Module) -> None:
    for layer in layers(model):
        layer.set_adapter("b")
        layer.set_scale("b", 0.3)


def do_set_two(model: nn.Module) -> None:
    for layer in layers(model):
        layer.set_adapter(["c", "a"], inference_mode=True)
        layer.scale_layer(0.7)


def do_train_some(model: nn.Module) -> None:
    for layer in layers(model)[:1]:
        layer.set_requires_grad(["a"], True)


@torch.no_grad()
@pytest.mark.parametrize("direct", [True, False])
@settings(max_examples=25, deadline=None)
@given(
    before=st.lists(
        st.sampled_from([do_disable, do_enable, do_set_one, do_set_two, do_train_some]), max_size=3
    ),
    within=st.lists(WEIGHTS, max_size=3),
)
def test_restore_undoes_everything(
    direct: bool, before: list[Any], within: list[dict[str, float]]
) -> None:
    model = net()
    for action in before:
        action(model)
    expected, output = state(model), model(X)
    switch = AdapterSwitch(model, direct=direct)
    snapshot = switch.snapshot()
    switch.freeze()
    for weights in within:
        switch.activate(weights)
    do_set_one(model)  # and whatever the user did meanwhile
    switch.restore(snapshot)
    assert state(model) == expected
    assert torch.equal(model(X), output)


def test_names_and_a_model_without_adapters() -> None:
    assert AdapterSwitch(net()).names == NAMES
    bare = AdapterSwitch(Net())
    assert bare.names == ()
    bare.activate({"a": 1.0})
    bare.restore(bare.snapshot())


def test_this_peft_is_switched_directly() -> None:
    model = net()
    gradients = [p.requires_grad for p in model.parameters()]
    AdapterSwitch(model).activate({"b": 1.0})
    assert [p.requires_grad for p in model.parameters()] == gradients


def test_many_strengths_are_not_remembered_for_ever() -> None:
    switch = AdapterSwitch(net())
    for i in range(1000):
        switch.activate({"a": i / 1000})
    assert len(switch._activations) <= 256


def test_other_kinds_of_adapters() -> None:
    model = Net()
    inject_adapter_in_model(LoHaConfig(r=2, target_modules=["first"]), model, adapter_name="loha")
    AdapterSwitch(model).activate({"loha": 0.5})
    assert model.first.scaling == {"loha": 0.5 * 8 / 2}
    model = Net()
    config = OFTConfig(oft_block_size=3, r=0, target_modules=["first"])
    inject_adapter_in_model(config, model, adapter_name="turn")
    AdapterSwitch(model).activate({"turn": 1.0})
    with pytest.raises(CmloraError, match=r"turn: adapters of type .* have no strength"):
        AdapterSwitch(model).activate({"turn": 0.5})


def test_a_deleted_lora_stays_deleted() -> None:
    model = net()
    switch = AdapterSwitch(model)
    snapshot = switch.snapshot()
    for layer in layers(model):
        layer.delete_adapter("c")
    switch.restore(snapshot)
    assert AdapterSwitch(model).names == ("a", "b")
    assert all("c" not in layer.scaling for layer in layers(model))


@torch.no_grad()
@pytest.mark.parametrize("direct", [True, False])
def test_strengths_per_block_reach_exactly_the_named_layers(direct: bool) -> None:
    reference, model = net(), net()
    switch = AdapterSwitch(model, direct=direct)
    for layer, active in zip(layers(reference), (["c"], ["a", "b"], ["b", "c"]), strict=True):
        layer.set_adapter(active, inference_mode=True)
    reference.second.set_scale("a", 0.5)  # type: ignore[operator]
    reference.first.set_scale("c", 2.0)  # type: ignore[operator]
    reference.conv.set_scale("c", 0.25)  # type: ignore[operator]
    switch.activate({"a": (("sec", 0.5),), "b": 1.0, "c": (("^first$", 2.0), ("", 0.25))})
    assert torch.equal(model(X), reference(X))
    switch.activate({"a": 1.0})
    for layer in layers(reference):
        layer.set_adapter(["a"], inference_mode=True)
        if "a" in layer.scaling:
            layer.set_scale("a", 1.0)
    assert torch.equal(model(X), reference(X))


def test_patterns_that_match_nothing_are_named() -> None:
    switch = AdapterSwitch(net())
    with pytest.raises(CmloraError, match="a: no layer matches 'third'; it acts in first, second"):
        switch.activate({"a": (("third", 0.5), ("fourth", 1.0))})
    with pytest.raises(CmloraError, match="a: no layer matches 'third'"):
        switch.check_blocks("a", "third")
    switch.check_blocks("a", "fir")
    assert not switch.acts("a", "third")
    with pytest.raises(CmloraError, match="is no regular expression"):
        switch.activate({"a": (("(", 1.0),)})


def test_a_shift_inside_a_lora_goes_by_the_name_of_its_layer() -> None:
    model = net()
    wrap(model, "first").add("a", torch.full((6, 6), 0.5), None)
    switch = AdapterSwitch(model)
    switch.activate({"a": (("^first$", 0.5), ("", 1.0))})
    exact = model(X)
    switch.activate({"a": (("first", 0.5), ("", 1.0))})
    assert torch.equal(model(X), exact)
    switch.activate({"a": 1.0})
    assert not torch.allclose(model(X), exact)
