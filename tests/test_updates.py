"""Sizes of LoRAs in a model, against their dense updates."""

import pytest
from peft import LoraConfig, inject_adapter_in_model

from cmlora.updates import Updates, updates
from tests.test_gating import Net, net


def test_what_is_measured_is_what_the_dense_updates_say() -> None:
    model = net(use_rslora=True)
    dense = {
        name: sum(
            float(getattr(model, layer).get_delta_weight(name).detach().square().sum())
            for layer in ("tokens", "vector", "conv")
        )
        ** 0.5
        for name in "abc"
    }
    found = updates([model], "abc")
    assert found.plain
    assert found.sizes == pytest.approx(dense, rel=1e-5)
    both = updates([model, model], "abc").sizes
    assert both["a"] == pytest.approx(2**0.5 * dense["a"], rel=1e-5)


def test_strengths_of_the_moment_make_no_difference() -> None:
    model = net()
    before = updates([model], "ab")
    model.tokens.set_scale("a", 0.25)  # type: ignore[operator]
    assert updates([model], "ab") == before


def test_loras_in_parts_of_the_model() -> None:
    model = Net()
    for name, layers in (("a", ["tokens"]), ("b", ["tokens", "conv"])):
        config = LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
        inject_adapter_in_model(config, model, adapter_name=name)
    found = updates([model], ["b", "a", "elsewhere"]).sizes
    assert list(found) == ["b", "a", "elsewhere"]
    assert found["a"] > 0
    assert found["b"] > 0
    assert found["elsewhere"] == 0


def test_other_adapters_and_offloaded_models_are_not_measured() -> None:
    assert updates([net(use_dora=True)], "ab") == Updates(plain=False)
    assert updates([net().to("meta")], "ab") == Updates()
