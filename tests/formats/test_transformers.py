"""Files for FLUX in a real, tiny FLUX: every trainer's, fused layers, biases and norms."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmlora import files
from cmlora.errors import CmloraError
from cmlora.originals import TABLES, translate
from tests import families, trainers
from tests.formats.cases import CASES, noise

HIDDEN = 16
OTHERS = ("processor", "_qkv", "fc", "mod.linear", "modulation.linear", "attn_proj", "in.mlp")
"""Marks of second names for the same layers."""


@pytest.fixture(scope="module")
def pipe() -> Any:
    return families.flux().pipe


def originals(model: nn.Module) -> dict[str, tuple[tuple[str, ...], tuple[int, int]]]:
    """Original names of all linear layers of the model: its modules, and the shape of the whole."""
    found = {}
    lines = [line.partition(" = ")[0].strip() for line in TABLES["flux"].strip().splitlines()]
    names = dict(model.named_modules())
    for line in lines:
        for number in range(3):
            name = line.replace("#", str(number))
            told = translate(name, "flux")
            if told is None or any(mark in name for mark in OTHERS):
                continue
            layers = [names.get(module) for module in told[0]]
            if not all(isinstance(layer, nn.Linear) for layer in layers):
                continue
            rows = sum(layer.out_features for layer in layers if isinstance(layer, nn.Linear))
            assert isinstance(layers[0], nn.Linear)
            found[name] = (told[0], (rows, layers[0].in_features))
    return found


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(1, 9, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, HIDDEN, generator=generator),
        "pooled_projections": torch.randn(1, HIDDEN, generator=generator),
        "timestep": torch.tensor([0.4]),
        "guidance": torch.tensor([3.0]),
        "img_ids": torch.zeros(9, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    result: Tensor = model(**arguments).sample
    return result


def whole(model: Any, modules: tuple[str, ...]) -> Tensor:
    return torch.cat([model.get_submodule(module).weight.detach() for module in modules])


@pytest.mark.parametrize("form", ["lora", "lokr", "loha", "full", "dora", "oft", "glora"])
def test_fused_layers_of_every_form(form: str, pipe: Any, tmp_path: Path) -> None:
    base = families.flux().pipe.transformer
    stored: dict[str, Tensor] = {}
    torch.manual_seed(1)
    for name, (modules, shape) in originals(base).items():
        if not name.startswith(("double_blocks.0.", "single_blocks.1.")):
            continue
        tensors = CASES[form].make(shape)
        tensors.pop("diff_b", None)
        stored |= {
            f"lora_unet_{name.replace('.', '_')}.{k}": 0.3 * t if "alpha" not in k else t
            for k, t in tensors.items()
        }
        scaled = {k: 0.3 * t if "alpha" not in k else t for k, t in tensors.items()}
        delta = CASES[form].delta(scaled, whole(base, modules))
        with torch.no_grad():
            layers = [base.get_submodule(module) for module in modules]
            rows = [layer.out_features for layer in layers]
            for layer, part in zip(layers, torch.split(delta, rows), strict=True):
                layer.weight.add_(part)
    path = trainers.save(stored, tmp_path / "x.safetensors")
    before = outputs(pipe.transformer)
    files.load(pipe, path, "x")
    try:
        expected = outputs(base)
        assert float((expected - before).abs().max()) > 1e-3
        torch.testing.assert_close(outputs(pipe.transformer), expected, rtol=1e-3, atol=2e-4)
    finally:
        pipe.unload_lora_weights()
    assert torch.equal(outputs(pipe.transformer), before)


def xlabs() -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for number in (1, 2):
        stem = f"double_blocks.0.processor.qkv_lora{number}"
        found |= {f"{stem}.down.weight": noise(2, HIDDEN), f"{stem}.up.weight": noise(48, 2)}
        stem = f"double_blocks.1.processor.proj_lora{number}"
        found |= {f"{stem}.down.weight": noise(2, HIDDEN), f"{stem}.up.weight": noise(16, 2)}
    stem = "single_blocks.0.processor.qkv_lora"
    return found | {f"{stem}.down.weight": noise(2, HIDDEN), f"{stem}.up.weight": noise(48, 2)}


def kohya() -> dict[str, Tensor]:
    found = {}
    for stem, rows in (
        ("double_blocks_0_img_attn_qkv", 48),
        ("double_blocks_1_txt_attn_qkv", 48),
        ("double_blocks_0_img_attn_proj", 16),
        ("double_blocks_0_txt_mlp_0", 64),
    ):
        found[f"lora_unet_{stem}.lora_down.weight"] = noise(4, HIDDEN)
        found[f"lora_unet_{stem}.lora_up.weight"] = noise(rows, 4)
        found[f"lora_unet_{stem}.alpha"] = torch.tensor(2.0)
    return found


def toolkit() -> dict[str, Tensor]:
    stem = "transformer.single_transformer_blocks.0.attn.to_q"
    return {f"{stem}.lora_A.weight": noise(2, HIDDEN), f"{stem}.lora_B.weight": noise(16, 2)}


def onetrainer() -> dict[str, Tensor]:
    stem = "lora_transformer_transformer_blocks_1_attn_add_k_proj"
    return {
        f"{stem}.lora_down.weight": noise(2, HIDDEN),
        f"{stem}.lora_up.weight": noise(16, 2),
        f"{stem}.alpha": torch.tensor(1.0),
    }


@pytest.mark.parametrize("make", [xlabs, kohya, toolkit])
def test_diffusers_own_converters_agree(make: Any, pipe: Any, tmp_path: Path) -> None:
    torch.manual_seed(7)
    path = trainers.save(make(), tmp_path / "x.safetensors")
    theirs = families.flux().pipe
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.load_lora_weights(str(path), adapter_name="x")
    before = outputs(pipe.transformer)
    files.load(pipe, path, "x")
    try:
        found = outputs(pipe.transformer)
    finally:
        pipe.unload_lora_weights()
    assert float((found - before).abs().max()) > 1e-3
    torch.testing.assert_close(found, outputs(theirs.transformer), rtol=1e-3, atol=1e-4)


def test_onetrainer_and_comfyui_name_the_same_layers(pipe: Any, tmp_path: Path) -> None:
    torch.manual_seed(8)
    stored = onetrainer()
    read = files.read(trainers.save(stored, tmp_path / "one.safetensors"))
    assert list(read.updates) == ["transformer.transformer_blocks.1.attn.add_k_proj"]
    torch.manual_seed(8)
    named = {
        f"diffusion_model.{key.removeprefix('lora_unet_').replace('_', '.', 0)}": tensor
        for key, tensor in kohya().items()
    }
    dotted = {}
    for key, tensor in named.items():
        stem, _, end = key.partition(".lora_" if ".lora_" in key else ".alpha")
        flat = stem.removeprefix("diffusion_model.")
        original = {name.replace(".", "_"): name for name in originals(pipe.transformer)}[flat]
        tail = f".lora_{end}" if end else ".alpha"
        dotted[f"diffusion_model.{original}{tail}"] = tensor
    torch.manual_seed(8)
    flat_file = files.read(trainers.save(kohya(), tmp_path / "flat.safetensors"))
    dotted_file = files.read(trainers.save(dotted, tmp_path / "dotted.safetensors"))
    assert list(flat_file.updates) == list(dotted_file.updates)
    for module, update in flat_file.updates.items():
        assert torch.equal(update.delta(), dotted_file.updates[module].delta())


def test_control_loras_set_norms_and_shift_biases(pipe: Any, tmp_path: Path) -> None:
    torch.manual_seed(9)
    stored = {
        "double_blocks.0.img_attn.qkv.lora_A.weight": noise(2, HIDDEN),
        "double_blocks.0.img_attn.qkv.lora_B.weight": noise(48, 2),
        "double_blocks.0.img_attn.qkv.lora_B.bias": noise(48),
        "double_blocks.0.img_attn.norm.query_norm.scale": 1 + noise(8),
        "single_blocks.0.norm.key_norm.scale": 1 + noise(8),
        "final_layer.adaLN_modulation.1.lora_A.weight": noise(2, HIDDEN),
        "final_layer.adaLN_modulation.1.lora_B.weight": noise(32, 2),
        "final_layer.adaLN_modulation.1.lora_B.bias": noise(32),
    }
    base = families.flux().pipe.transformer
    with torch.no_grad():
        fused = stored["double_blocks.0.img_attn.qkv.lora_B.weight"]
        rows = (fused @ stored["double_blocks.0.img_attn.qkv.lora_A.weight"]).chunk(3)
        shifts = stored["double_blocks.0.img_attn.qkv.lora_B.bias"].chunk(3)
        for name, part, shift in zip(("to_q", "to_k", "to_v"), rows, shifts, strict=True):
            layer = base.get_submodule(f"transformer_blocks.0.attn.{name}")
            layer.weight.add_(part)
            layer.bias.add_(shift)
        norm = base.get_submodule("transformer_blocks.0.attn.norm_q")
        norm.weight.copy_(stored["double_blocks.0.img_attn.norm.query_norm.scale"])
        norm = base.get_submodule("single_transformer_blocks.0.attn.norm_k")
        norm.weight.copy_(stored["single_blocks.0.norm.key_norm.scale"])
        up = stored["final_layer.adaLN_modulation.1.lora_B.weight"]
        delta = up @ stored["final_layer.adaLN_modulation.1.lora_A.weight"]
        shift = stored["final_layer.adaLN_modulation.1.lora_B.bias"]
        base.norm_out.linear.weight.add_(torch.cat([delta[16:], delta[:16]]))
        base.norm_out.linear.bias.add_(torch.cat([shift[16:], shift[:16]]))
    before = outputs(pipe.transformer)
    path = trainers.save(stored, tmp_path / "x.safetensors")
    files.load(pipe, path, "x")
    try:
        torch.testing.assert_close(outputs(pipe.transformer), outputs(base), rtol=1e-3, atol=1e-4)
    finally:
        pipe.unload_lora_weights()
    assert torch.equal(outputs(pipe.transformer), before)
    found = files.describe(path)
    assert found["trainer"] == "Black Forest Labs"
    assert found["family"] == "FLUX.1"


def test_a_unets_lora_names_both_families(pipe: Any, tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    stored = {f"{stem}.lora_down.weight": noise(2, 768), f"{stem}.lora_up.weight": noise(320, 2)}
    with pytest.raises(CmloraError, match=r"for Stable Diffusion 1\.x and the pipeline is FLUX\.1"):
        files.load(pipe, trainers.save(stored, tmp_path / "x.safetensors"), "x")
