"""All tuners in whole models: what diffusers, transformers, PEFT and `compose` do with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from peft import (
    PeftModel,
    get_peft_model,
)
from torch import nn

import cmlora
from cmlora.adapters.tuners import TUNERS, store
from cmlora.errors import CmloraError
from tests import tiny
from tests.tuners import bench
from tests.tuners.bench import close, quiet

HOME = [name for name in TUNERS if name in bench.OPTIONS]
TEXT = list(tiny.TEXT_TARGETS)
UNET = ["to_q", "to_out.0", "conv1", "conv_shortcut"]

FEW = ("nola", "hydra", "snell", "s2ft", "oft", "loha")

home = pytest.mark.parametrize("name", HOME)
few = pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in HOME]
)


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
    with quiet():
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


@few
def test_a_whole_pipeline_saves_loads_and_composes(name: str, tmp_path: Path) -> None:
    pipe = tiny.sd15(channels=(8, 16), layers_per_block=1)
    parts = [(pipe.unet, UNET), (pipe.text_encoder, TEXT)]
    for number, adapter in enumerate("ab"):
        for model, targets in parts:
            with quiet():
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
        with quiet():
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
    terrible: Any = bench.adapt("nola", "linear")
    terrible.peft_config["a"].target_modules = "(a*)*b"
    store.save(terrible, "a", path)
    fine: Any = bench.Holder(bench.base("linear"))
    store.load(fine, path, "a")
    assert fine.peft_config["a"].target_modules == {"layer"}
    settings = TUNERS["loha"].object.settings(target_modules=["layer"], rank_pattern={"(a*)*b": 2})
    loha = bench.Holder(bench.base("linear"))
    bench.inject(loha, settings, "a")
    store.save(loha, "a", path)
    with pytest.raises(CmloraError, match="not read"):
        store.load(bench.Holder(bench.base("linear")), path, "a")
    settings = TUNERS["loha"].object.settings(target_modules=["layer"], alpha_pattern={"la.*": 2})
    loha = bench.Holder(bench.base("linear"))
    bench.inject(loha, settings, "a")
    store.save(loha, "a", path)
    again: Any = bench.Holder(bench.base("linear"))
    store.load(again, path, "a")
    assert again.layer.scaling == loha.layer.scaling
    assert again.layer.scaling["a"] == 2 / settings.r
    store.save(again, "a", path)
    store.load(bench.Holder(bench.base("linear")), path, "a")
    xs = bench.adapt("lora_sb", "linear")
    store.save(xs, "a", path)
    wrong = bench.Holder(bench.base("bare"))
    with pytest.raises(CmloraError, match="needs"):
        store.load(wrong, path, "a")
    assert type(wrong.layer) is nn.Linear
