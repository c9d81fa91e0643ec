"""Sizes and overlap of LoRAs in a model, against their dense updates."""

import itertools

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from cmlora.overlap import Overlap, overlap
from tests.test_gating import Net, net


def test_what_is_measured_is_what_the_dense_updates_say() -> None:
    model = net(use_rslora=True)
    dense = {
        name: torch.cat(
            [
                getattr(model, layer).get_delta_weight(name).detach().double().flatten()
                for layer in ("tokens", "vector", "conv")
            ]
        )
        for name in "abc"
    }
    found = overlap([model], "abc")
    assert found.plain
    assert found.sizes == pytest.approx({n: float(d.norm()) for n, d in dense.items()}, rel=1e-5)
    cosines = [
        float(torch.cosine_similarity(dense[a], dense[b], 0).abs())
        for a, b in itertools.combinations("abc", 2)
    ]
    assert found.interference == pytest.approx(max(cosines), rel=1e-4)
    again = overlap([model, model], "abc")
    assert again.interference == pytest.approx(found.interference)
    assert again.sizes["a"] == pytest.approx(2**0.5 * found.sizes["a"])


def test_strengths_of_the_moment_make_no_difference() -> None:
    model = net()
    before = overlap([model], "ab")
    model.tokens.set_scale("a", 0.25)  # type: ignore[operator]
    assert overlap([model], "ab") == before


def test_loras_in_parts_of_the_model() -> None:
    model = Net()
    for name, layers in (("a", ["tokens"]), ("b", ["tokens", "conv"]), ("c", ["vector"])):
        config = LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
        inject_adapter_in_model(config, model, adapter_name=name)
    found = overlap([model], ["b", "a", "c"])
    assert list(found.sizes) == ["b", "a", "c"]
    assert all(found.sizes.values())
    assert overlap([model], ["a", "c"]).interference == 0.0
    assert overlap([model], ["a"]).interference is None


def test_other_adapters_and_offloaded_models_are_not_measured() -> None:
    assert overlap([net(use_dora=True)], "ab") == Overlap(plain=False)
    assert overlap([net().to("meta")], "ab") == Overlap()
