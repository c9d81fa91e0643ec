"""The contract of all tuners: one battery over every method and every kind of layer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn

from cmlora.adapters.tuners import TUNERS, layer
from cmlora.errors import CmloraError
from cmlora.switching import AdapterSwitch
from tests.tuners import bench
from tests.tuners.bench import close, quiet
from tests.tuners.references import REFERENCES

HOME = [name for name in TUNERS if name in bench.OPTIONS]

home = pytest.mark.parametrize("name", HOME)
kinds = pytest.mark.parametrize("kind", bench.BASES)


def only(model: nn.Module) -> Any:
    """The adapted layer of a model that has one."""
    (found,) = bench.layers(model)
    return found


def test_every_file_is_a_row_with_a_reference() -> None:
    folder = Path(layer.__file__).parent
    machinery = {"__init__", "layer", "plugin", "tensors", "store", "export"}
    files = {path.stem for path in folder.glob("*.py")} - machinery
    assert files == set(HOME) == set(REFERENCES)


@home
@kinds
def test_the_start_changes_nothing(name: str, kind: str) -> None:
    base: Any = bench.base(kind)
    x = bench.data(base)
    model = bench.adapt(name, kind)
    assert torch.equal(model(x), base(x))
    assert torch.equal(only(model).base_layer.weight, base.weight)


@home
@kinds
def test_update_is_the_references(name: str, kind: str) -> None:
    model = bench.adapt(name, kind)
    bench.shake(model)
    adapted = only(model)
    weight = adapted.matrix().double().numpy()
    config = adapted.config["a"]
    expected = REFERENCES[name](weight, bench.tensors(adapted), config, adapted.seeds["a"])
    delta = adapted.get_delta_weight("a").detach().flatten(1)
    assert delta.abs().max() > 1e-4
    assert close(delta, torch.tensor(expected).float() * config.strength())


@home
@kinds
def test_merging_is_the_forward_and_comes_off_to_the_bit(name: str, kind: str) -> None:
    model = bench.adapt(name, kind, ("a", "b"))
    adapted = only(model)
    for number, adapter in enumerate(("a", "b")):
        bench.shake(model, adapter, number)
    adapted.set_adapter(["a", "b"])
    adapted.set_scale("b", -0.5)
    x = bench.data(adapted.get_base_layer())
    before, output = copy.deepcopy(adapted.base_layer.state_dict()), model(x)
    adapted.merge(safe_merge=True, adapter_names=["a"])
    with pytest.warns(UserWarning, match="additionally"):
        adapted.merge(adapter_names=["b"])
    assert close(model(x), output)
    adapted.enable_adapters(False)
    assert torch.equal(model(x), bench.base(kind)(x))
    adapted.enable_adapters(True)
    for key, value in adapted.base_layer.state_dict().items():
        assert torch.equal(value, before[key])
    assert torch.equal(model(x), output)


@home
@kinds
def test_strength_is_linear_and_zero_is_the_base(name: str, kind: str) -> None:
    model = bench.adapt(name, kind)
    bench.shake(model)
    adapted = only(model)
    x = bench.data(adapted.get_base_layer())
    base = bench.base(kind)(x)
    outputs = {}
    for strength in (0.0, 0.5, 1.0):
        adapted.set_scale("a", strength)
        outputs[strength] = model(x)
    assert torch.equal(outputs[0.0], base)
    assert not close(outputs[1.0], base, 1e-3)
    assert close(outputs[0.5] - base, (outputs[1.0] - base) / 2)
    adapted.scale_layer(0.5)
    assert close(model(x), outputs[0.5])
    adapted.unscale_layer(0.5)
    assert torch.equal(model(x), outputs[1.0])
    adapted.scale_layer(0.0)
    adapted.unscale_layer()
    assert torch.equal(model(x), outputs[1.0])
    adapted.set_scale("nobody", 3.0)


@home
@kinds
def test_adapters_add_up_and_do_not_know_each_other(name: str, kind: str) -> None:
    x = bench.data(bench.base(kind))
    alone, base = {}, bench.base(kind)(x)
    for number, adapter in enumerate("ab"):
        single = bench.adapt(name, kind, (adapter,), seed=number)
        bench.shake(single, adapter, number)
        alone[adapter] = single(x)
    model = bench.adapt(name, kind, ("a",), seed=0)
    bench.inject(model, bench.settings(name, seed=1), "b")
    for number, adapter in enumerate("ab"):
        bench.shake(model, adapter, number)
    adapted = only(model)
    for adapter in "ab":
        adapted.set_adapter(adapter)
        assert torch.equal(model(x), alone[adapter])
    adapted.set_adapter(["a", "b"])
    assert close(model(x), alone["a"] + alone["b"] - base)
    with quiet():
        adapted.delete_adapter("b")
    assert torch.equal(model(x), alone["a"])


@home
def test_gradients_reach_what_is_trained_and_nothing_else(name: str) -> None:
    for kind in ("linear", "conv3"):
        model = bench.adapt(name, kind).train()
        adapted = only(model)
        x = bench.data(adapted.get_base_layer())
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(len(getattr(adapted, a)) for a in adapted.adapter_layer_names) == len(trained)
        optimizer = torch.optim.SGD(trained, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert frozen
        assert all(p.grad is None for p in frozen)


@home
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv3"])
def test_half_precision(name: str, dtype: torch.dtype, kind: str) -> None:
    exact = bench.adapt(name, kind)
    x = bench.data(exact.layer.base_layer)  # type: ignore[arg-type]
    for early in (True, False):  # the model is cast before or after the adapter is added
        model = bench.Holder(bench.base(kind)).eval()
        if early:
            model.to(dtype)
        bench.inject(model, bench.settings(name), "a")
        model.to(dtype)
        assert torch.equal(model(x.to(dtype)), only(model).base_layer(x.to(dtype)))
    bench.shake(exact, size=0.1)
    bench.shake(model, size=0.1)
    output = model(x.to(dtype))
    assert output.dtype == dtype
    error = (output.float() - exact(x)).norm() / exact(x).norm()
    assert error < 0.05
    kept = only(model).base_layer.weight.clone()
    only(model).merge()
    assert (model(x.to(dtype)) - output).float().norm() / output.float().norm() < 0.05
    only(model).unmerge()
    assert torch.equal(only(model).base_layer.weight, kept)


@home
def test_a_switch_decides_what_acts(name: str) -> None:
    model = bench.adapt(name, "linear", ("a", "b"))
    for number, adapter in enumerate("ab"):
        bench.shake(model, adapter, number)
    adapted = only(model)
    x = bench.data(adapted.get_base_layer())
    switch = AdapterSwitch(model)
    snapshot = switch.snapshot()
    base = bench.base("linear")(x)
    adapted.set_adapter("b")
    adapted.set_scale("b", 0.5)
    expected = model(x)
    switch.activate({})
    assert torch.equal(model(x), base)
    switch.activate({"a": 0.0, "b": 0.5})
    assert torch.equal(model(x), expected)
    switch.restore(snapshot)
    assert adapted.scaling["b"] == adapted.initial["b"]


@pytest.mark.parametrize("order", [("lora", "hydra"), ("hydra", "lora")])
@pytest.mark.parametrize("unmerge_outer_first", [True, False])
def test_merging_beside_another_tuner(order: tuple[str, str], unmerge_outer_first: bool) -> None:
    model: Any = bench.Holder(bench.base("linear")).eval()
    for name in order:
        options = {"r": 2} if name == "lora" else bench.OPTIONS[name]
        config = TUNERS[name].object.settings(target_modules=["layer"], **options)
        bench.inject(model, config, name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    x = bench.data(bench.base("linear"))
    base, both = bench.base("linear")(x), model(x)
    chain = [model.layer, model.layer.base_layer]
    for _ in range(2):
        for each in chain:
            each.merge()
        if order[1] == "hydra":  # which otherwise recombines the weight with the LoRA in it
            assert close(model(x), both, 1e-3)
        for each in chain if unmerge_outer_first else chain[::-1]:
            each.unmerge()
        for each in chain:
            each.enable_adapters(False)
        assert close(model(x), base, 1e-4)
        for each in chain:
            each.enable_adapters(True)
        assert close(model(x), both, 1e-3)


@home
def test_inference_mode_leaves_nothing_that_training_cannot_use(name: str) -> None:
    model = bench.adapt(name, "linear")
    bench.shake(model)
    x = bench.data(bench.base("linear"))
    only(model).frozen_tensors.clear()
    with torch.inference_mode():
        model(x)
    model(x).square().sum().backward()


@home
def test_copies_double_precision_and_autocast(name: str) -> None:
    model = bench.adapt(name, "conv3")
    bench.shake(model, size=0.05)
    x = bench.data(bench.base("conv3"))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    output.float().sum().backward()
    assert (output.float() - model(x)).norm() / model(x).norm() < 0.05
    double = bench.Holder(bench.base("conv3").double())
    bench.inject(double, bench.settings(name), "a")
    assert torch.equal(double(x.double()), only(double).base_layer(x.double()))
    bench.shake(double)
    expected = double(x.double())
    only(double).merge()
    assert close(double(x.double()), expected, 1e-9)


@home
def test_default_settings_fit_layers_of_models(name: str) -> None:
    model = bench.Holder(nn.Linear(320, 64))
    bench.inject(model, TUNERS[name].object.settings(target_modules=["layer"]), "a")
    x = torch.ones(1, 2, 320)
    assert torch.equal(model(x), only(model).base_layer(x))


@home
def test_injection_without_memory(name: str) -> None:
    source = bench.adapt(name, "linear")
    bench.shake(source)
    state = get_peft_model_state_dict(source, adapter_name="a")
    model = bench.Holder(bench.base("linear"))
    inject_adapter_in_model(bench.settings(name), model, "a", low_cpu_mem_usage=True)
    set_peft_model_state_dict(model, state, "a", low_cpu_mem_usage=True)
    x = bench.data(bench.base("linear"))
    assert torch.equal(model(x), source(x))


def test_mistakes_in_settings() -> None:
    with pytest.raises(CmloraError, match="r is 0"):
        bench.settings("nola", r=0)
    with pytest.raises(CmloraError, match="bias"):
        bench.settings("nola", bias="all")
