"""PEFT's own tuners: rows that are used as they are, and the defects that made us write others.

Each defect is shown on PEFT's tuner first: when a release mends it, the test says so, and our own
may become unnecessary.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from cmlora.adapters.tuners import TUNERS, plugin, store
from cmlora.switching import AdapterSwitch
from tests import tiny
from tests.tuners import bench
from tests.tuners.bench import quiet

LINEAR = ["to_q", "to_out.0"]
THEIRS = ("lora", "rslora", "dora", "loha", "lokr")
INPUTS = (tiny.latents(), torch.tensor(3), torch.zeros(1, 4, 16) + 0.1)


def unet() -> Any:
    return tiny.unet_sd15(channels=(8, 16), layers_per_block=1)


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(*INPUTS, return_dict=False)[0]
    return result


def add(model: Any, config: Any, name: str, size: float = 0.0) -> None:
    with quiet():
        model.add_adapter(config, name)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}" in key and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random) * size)


def ours(name: str, targets: Any = LINEAR, **options: Any) -> Any:
    return bench.settings(name, targets, **options)


@pytest.mark.parametrize("name", THEIRS)
def test_rows_of_peft_switch_save_and_load(name: str, tmp_path: Path) -> None:
    model = unet()
    base = run(model)
    for adapter in ("a", "b"):
        config = TUNERS[name].object.settings(r=4, target_modules=[*LINEAR, "conv1"])
        add(model, config, adapter, 0.1)
    switch = AdapterSwitch(model)
    switch.activate({"a": 1.0})
    expected = run(model)
    assert (expected - base).abs().max() > 1e-3
    switch.activate({"a": 0.5, "b": 0.5})
    assert not torch.equal(run(model), expected)
    switch.activate({})
    assert torch.equal(run(model), base)
    store.save(model, "a", tmp_path / "a.safetensors")
    other = unet()
    store.load(other, tmp_path / "a.safetensors", "again")
    assert torch.allclose(run(other), expected, atol=1e-6)
    store.remove(other, "again")
    assert torch.equal(run(other), base)


def test_no_name_of_ours_is_taken() -> None:
    for name in bench.OPTIONS:
        kind = plugin.peft_type(name)
        assert kind.value == f"CM{name.upper()}"
        assert PEFT_TYPE_TO_TUNER_MAPPING[kind] is TUNERS[name].object.model
        assert plugin.peft_type(name) is kind


def test_pissa_changes_the_base_for_good() -> None:
    model = unet()
    base = run(model)
    add(model, peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="pissa"), "a", 0.1)
    first = run(model)
    add(model, peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="pissa"), "b")
    model.set_adapters("a", 1.0)
    assert (run(model) - first).abs().max() > 1e-3
    model.unload_lora()
    assert (run(model) - base).abs().max() > 1e-3
    with pytest.raises(ValueError, match="pissa"):
        add(unet(), peft.LoraConfig(target_modules=["conv1"], init_lora_weights="pissa"), "a")

    model = unet()
    add(model, ours("pissa", [*LINEAR, "conv1"]), "a", 0.1)
    first = run(model)
    add(model, ours("pissa", [*LINEAR, "conv1"]), "b")
    model.set_adapters("a", 1.0)
    assert torch.equal(run(model), first)
    model.unload_lora()
    assert torch.equal(run(model), base)


def test_olora_changes_the_base_for_good() -> None:
    model = unet()
    base = run(model)
    add(model, peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="olora"), "a", 0.1)
    model.unload_lora()
    assert (run(model) - base).abs().max() > 1e-3


def test_dora_at_weight_zero_is_not_the_base() -> None:
    model = unet()
    base = run(model)
    add(model, TUNERS["dora"].object.settings(r=4, target_modules=LINEAR), "a", 0.1)
    model.set_adapters("a", 0.0)
    assert (run(model) - base).abs().max() > 1e-4
    AdapterSwitch(model).activate({"a": 0.0})
    assert torch.equal(run(model), base)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("VeraConfig", {"r": 4}),
        ("PveraConfig", {"r": 4}),
        ("TinyLoraConfig", {"r": 2}),
        ("VBLoRAConfig", {"r": 2, "num_vectors": 8, "vector_length": 8}),
        ("UniLoraConfig", {"r": 2, "theta_d_length": 16}),
        ("FrodConfig", {}),
    ],
)
def test_layers_that_share_tensors_cannot_be_injected(name: str, options: dict[str, Any]) -> None:
    config = getattr(peft, name)(target_modules=LINEAR, **options)
    with pytest.raises(ValueError, match="shared state"):
        add(unet(), config, "a")


def test_ours_shares_by_seed() -> None:
    add(unet(), ours("vera"), "a")


def test_fourierft_changes_the_start_and_has_no_strength() -> None:
    model = unet()
    base = run(model)
    add(model, peft.FourierFTConfig(n_frequency=10, target_modules=LINEAR), "a")
    assert (run(model) - base).abs().max() > 1e-4
    with pytest.raises(AttributeError):
        model.set_adapters("a", 0.5)


def test_shira_knows_no_scale_of_a_call() -> None:
    model = unet()
    add(model, peft.ShiraConfig(r=2, target_modules=LINEAR), "a", 0.1)
    model.set_adapters("a", 0.5)
    with pytest.raises(AttributeError):
        model(*INPUTS, return_dict=False, cross_attention_kwargs={"scale": 0.5})


def test_adalora_does_not_come_back_to_its_strength() -> None:
    model = unet()
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=LINEAR)
    add(model, config, "a", 0.1)
    first = run(model)
    model.set_adapters("a", 0.5)
    model.set_adapters("a", 1.0)
    assert (run(model) - first).abs().max() > 1e-4
    for name in bench.OPTIONS:
        layer = bench.adapted(name)
        before = bench.delta(layer)
        layer.set_scale("a", 0.5)
        layer.set_scale("a", 1.0)
        assert torch.equal(bench.delta(layer), before), name


def test_oft_with_a_short_series_is_no_rotation() -> None:
    torch.manual_seed(0)
    values = []
    for exact in (True, False):
        model = bench.Holder(bench.base("bare"))
        config = peft.OFTConfig(
            oft_block_size=4, target_modules=["layer"], use_cayley_neumann=not exact
        )
        bench.inject(model, config, "a")
        layer: Any = model.layer
        with torch.no_grad():
            for parameter in layer.oft_R.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.5)
        weight = layer.base_layer.weight.detach().clone()
        layer.merge()
        merged = layer.base_layer.weight.detach()
        pair = [torch.linalg.svdvals(w.double()) for w in (weight, merged)]
        values.append(float((pair[0] - pair[1]).abs().max() / pair[0].max()))
    assert values[0] < 1e-4
    assert values[1] > 1e-3
    rotated = bench.adapted("oft", "bare")
    weight = rotated.base_layer.weight.detach()
    one, two = (torch.linalg.svdvals(w.double()) for w in (weight, weight + bench.delta(rotated)))
    assert torch.allclose(one, two, atol=1e-5)


def test_diffusers_loads_no_file_of_another_tuner(tmp_path: Path) -> None:
    model = unet()
    add(model, ours("svfit"), "a", 0.1)
    expected = run(model)
    model.save_lora_adapter(tmp_path, "a")
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with quiet(), pytest.raises((IndexError, TypeError)):
        unet().load_lora_adapter(tmp_path, weight_name=file.name, prefix=None)
    other = unet()
    store.load(other, file, "a")
    assert torch.equal(run(other), expected)


def test_randlora_takes_one_adapter_and_cannot_be_saved(tmp_path: Path) -> None:
    config = peft.RandLoraConfig(r=4, target_modules=LINEAR)
    model = unet()
    add(model, config, "a")
    with pytest.raises(RuntimeError, match="share memory"):
        model.save_lora_adapter(tmp_path, "a")
    add(model, peft.RandLoraConfig(r=4, target_modules=LINEAR), "b")
    model.set_adapter("a")
    with pytest.raises(KeyError):
        run(model)
    model = unet()
    for name in ("a", "b"):
        add(model, ours("randlora"), name)
    model.set_adapters(["a", "b"])
    run(model)
    model.save_lora_adapter(tmp_path, "a")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ia3", peft.IA3Config(target_modules=LINEAR, feedforward_modules=[])),
        ("miss", peft.MissConfig(r=4, target_modules=LINEAR)),
        ("miss", peft.HRAConfig(r=4, target_modules=LINEAR)),
        ("miss", peft.HiraConfig(r=4, target_modules=LINEAR)),
        ("oft", peft.OFTConfig(oft_block_size=4, target_modules=LINEAR)),
        ("boft", peft.BOFTConfig(boft_block_size=4, target_modules=LINEAR)),
    ],
)
def test_tuners_without_a_strength(name: str, config: Any) -> None:
    model = unet()
    with quiet():
        add(model, config, "a")
        with pytest.raises(AttributeError):
            model.set_adapters("a", 0.5)
    model = unet()
    base = run(model)
    add(model, ours(name), "a", 0.1)
    model.set_adapters("a", 0.5)
    assert (run(model) - base).abs().max() > 1e-4


def test_oft_on_convolutions_changes_the_start() -> None:
    model = unet()
    base = run(model)
    with quiet():
        add(model, peft.OFTConfig(oft_block_size=4, target_modules=["conv1"]), "a")
    assert (run(model) - base).abs().max() > 1e-2
    model = unet()
    add(model, ours("oft", ["conv1"]), "a")
    assert torch.equal(run(model), base)


def test_lora_forgets_that_a_kernel_is_spread_out() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 9, 9)
    model = bench.Holder(torch.nn.Conv2d(4, 8, 3, padding=2, dilation=2))
    bench.inject(model, peft.LoraConfig(r=2, target_modules=["layer"]), "a")
    with pytest.raises(RuntimeError):
        model(x)
    model = bench.Holder(torch.nn.Conv2d(4, 8, 3, padding=2, dilation=2))
    bench.inject(model, bench.settings("pissa"), "a")
    bench.shake(model)
    expected = model(x)
    bench.layers(model)[0].merge()
    assert torch.allclose(model(x), expected, atol=1e-4)


def test_miss_has_no_convolutions() -> None:
    with pytest.raises(TypeError):
        add(unet(), peft.MissConfig(r=4, target_modules=["conv1"]), "a")
    add(unet(), ours("miss", ["conv1"]), "a")
