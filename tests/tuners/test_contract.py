"""The contract of all tuners: one battery over every method and every kind of layer."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn

import cmlora
from cmlora.adapters.tuners import TUNERS, layer, store
from cmlora.errors import CmloraError
from cmlora.switching import AdapterSwitch
from tests import tiny
from tests.tuners import bench
from tests.tuners.references import REFERENCES

HOME = [name for name in TUNERS if name in bench.OPTIONS]
TEXT = list(tiny.TEXT_TARGETS)
UNET = ["to_q", "to_out.0", "conv1", "conv_shortcut"]

home = pytest.mark.parametrize("name", HOME)
kinds = pytest.mark.parametrize("kind", bench.BASES)


def only(model: nn.Module) -> Any:
    """The adapted layer of a model that has one."""
    (found,) = bench.layers(model)
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's warnings that there is an adapter already, or that one was deleted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_every_file_is_a_row_with_a_reference() -> None:
    folder = Path(layer.__file__).parent
    machinery = {"__init__", "layer", "store", "export", "theirs"}
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
    with _quiet():
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


@home
def test_diffusers_calls_on_a_unet(name: str, tmp_path: Path) -> None:
    unet = tiny.unet_sd15(channels=(8, 16), layers_per_block=1)
    inputs = (tiny.latents(), torch.tensor(3), torch.zeros(1, 4, 16) + 0.1)
    weights = {key: value.clone() for key, value in unet.state_dict().items()}

    def run(**options: Any) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = unet(*inputs, return_dict=False, **options)[0]
        return result

    base = run()
    unet.add_adapter(bench.settings(name, UNET), "a")
    with _quiet():
        unet.add_adapter(bench.settings(name, UNET, seed=1), "b")
    assert torch.equal(run(), base)
    for number, adapter in enumerate("ab"):
        bench.shake(unet, adapter, number, 0.05)
    unet.set_adapters(["a", "b"], [1.0, 0.5])
    both = run()
    unet.set_adapters("a", 1.0)
    first = run()
    assert not close(first, base, 1e-4)
    unet.set_adapters("a", 0.5)
    half = run()
    unet.set_adapters("a", 1.0)
    assert close(run(cross_attention_kwargs={"scale": 0.5}), half)
    assert torch.equal(run(), first)
    unet.disable_adapters()
    assert torch.equal(run(), base)
    unet.enable_adapters()
    unet.set_adapters(["a", "b"], [1.0, 0.5])
    assert torch.equal(run(), both)
    unet.fuse_lora()
    assert close(run(), both, 1e-4)
    unet.unfuse_lora()
    assert torch.equal(run(), both)

    unet.save_lora_adapter(tmp_path, "a")
    store.save(unet, "a", tmp_path / "ours.safetensors")
    for file in ("pytorch_lora_weights.safetensors", "ours.safetensors"):
        other = tiny.unet_sd15(channels=(8, 16), layers_per_block=1)
        store.load(other, tmp_path / file, "elsewhere")
        with torch.no_grad():
            assert torch.equal(other(*inputs, return_dict=False)[0], first)
    unet.delete_adapters("b")
    unet.set_adapters("a", 1.0)
    assert torch.equal(run(), first)
    unet.unload_lora()
    assert all(torch.equal(v, weights[k]) for k, v in unet.state_dict().items())
    assert torch.equal(run(), base)


@home
def test_peft_calls_on_a_text_encoder(name: str, tmp_path: Path) -> None:
    tokens = torch.tensor([[0, 5, 7, 1]])
    encoder = tiny.text_encoder()
    base = encoder(tokens).last_hidden_state
    model = get_peft_model(encoder, bench.settings(name, TEXT))
    assert torch.equal(model(tokens).last_hidden_state, base)
    bench.shake(model, "default", size=0.1)
    output = model(tokens).last_hidden_state
    assert not close(output, base, 1e-4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.text_encoder(), tmp_path)
    assert torch.equal(again(tokens).last_hidden_state, output)
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert torch.equal(again(tokens).last_hidden_state, output)
    merged = model.merge_and_unload()
    assert not bench.layers(merged)
    assert close(merged(tokens).last_hidden_state, output, 1e-4)


@home
def test_transformers_calls_on_a_text_encoder(name: str, tmp_path: Path) -> None:
    tokens = torch.tensor([[0, 5, 7, 1]])
    encoder = tiny.text_encoder()
    base = encoder(tokens).last_hidden_state
    encoder.add_adapter(bench.settings(name, TEXT), "a")
    bench.shake(encoder, size=0.1)
    output = encoder(tokens).last_hidden_state
    assert not close(output, base, 1e-4)
    encoder.save_pretrained(tmp_path)
    again = tiny.text_encoder()
    again.load_adapter(str(tmp_path), "b")
    assert close(again(tokens).last_hidden_state, output, 0)
    encoder.disable_adapters()
    assert torch.equal(encoder(tokens).last_hidden_state, base)


@home
def test_a_diffusion_transformer(name: str) -> None:
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8
    ).eval()
    x = (tiny.latents(size=8), torch.tensor([3]), torch.tensor([1]))
    names = {"hidden_states": x[0], "timestep": x[1], "class_labels": x[2]}
    base = dit(**names).sample
    bench.inject(dit, bench.settings(name, ["to_k", "net.2", "pos_embed.proj"]), "a")
    assert torch.equal(dit(**names).sample, base)
    bench.shake(dit, size=0.1)
    assert not close(dit(**names).sample, base, 1e-4)


@home
def test_a_whole_pipeline_saves_loads_and_composes(name: str, tmp_path: Path) -> None:
    pipe = tiny.sd15(channels=(8, 16), layers_per_block=1)
    parts = [(pipe.unet, UNET), (pipe.text_encoder, TEXT)]
    for number, adapter in enumerate("ab"):
        for model, targets in parts:
            with _quiet():
                bench.inject(model, bench.settings(name, targets, seed=number), adapter)
            bench.shake(model, adapter, number, 0.05)
        store.save(pipe, adapter, tmp_path / f"{adapter}.safetensors")
    other = tiny.sd15(channels=(8, 16), layers_per_block=1)
    base = tiny.run(other, steps=2)
    for adapter in "ba":
        assert store.load(other, tmp_path / f"{adapter}.safetensors", adapter) == (
            "unet",
            "text_encoder",
        )
    results = []
    for each in (pipe, other):
        with cmlora.compose(each, {"a": 1.0, "b": 0.5}, method="composite"):
            results.append(tiny.run(each, steps=2))
    assert torch.equal(*results)
    assert not close(results[0], base, 1e-4)
    for adapter in "ab":
        for model in (other.unet, other.text_encoder):
            store.remove(model, adapter)
    assert not bench.layers(other.unet)
    assert torch.equal(tiny.run(other, steps=2), base)


def test_tuners_stand_on_each_other_and_on_lora() -> None:
    pipe = tiny.sd15(channels=(8, 16), layers_per_block=1)
    base = tiny.run(pipe, steps=2)
    tiny.add_loras(pipe, ["lora"])
    for name in ("nola", "vera"):
        with _quiet():
            pipe.unet.add_adapter(bench.settings(name, UNET), name)
        bench.shake(pipe.unet, name, size=0.1)
    outputs = []
    for names in (["lora"], ["nola"], ["vera"], ["lora", "nola", "vera"]):
        with cmlora.compose(pipe, names, method="merge"):
            outputs.append(tiny.run(pipe, steps=2))
    outputs.append(base)
    for number, one in enumerate(outputs):
        assert not any(close(one, other, 1e-4) for other in outputs[:number])
    with cmlora.compose(pipe, ["lora"], method="naive"):
        assert torch.equal(tiny.run(pipe, steps=2), base)


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


def test_a_file_that_does_not_fit_leaves_the_model_alone(tmp_path: Path) -> None:
    model = bench.adapt("nola", "linear")
    path = tmp_path / "a.safetensors"
    store.save(model, "a", path)
    for other, message in (
        (nn.Sequential(nn.Linear(2, 2)), "not in the model"),
        (bench.Holder(nn.LayerNorm(4)), "LayerNorm; nola adapts Linear"),
    ):
        with pytest.raises(CmloraError, match=message):
            store.load(other, path, "a")
        assert not bench.layers(other)
        assert not hasattr(other, "peft_config")
    with pytest.raises(CmloraError, match="already"):
        store.load(model, path, "a")
    with pytest.raises(CmloraError, match="no adapter 'b'"):
        store.save(model, "b", path)
    xs = bench.adapt("lora_sb", "linear")
    store.save(xs, "a", path)
    wrong = bench.Holder(bench.base("bare"))
    with pytest.raises(CmloraError, match="needs"):
        store.load(wrong, path, "a")
    assert type(wrong.layer) is nn.Linear


def test_mistakes_in_settings() -> None:
    with pytest.raises(CmloraError, match="r is 0"):
        bench.settings("nola", r=0)
    with pytest.raises(CmloraError, match="bias"):
        bench.settings("nola", bias="all")
