"""Files for FLUX.2, whose original names are those of FLUX.1."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from torch import Tensor, nn

from cmlora import files, keys
from cmlora.errors import CmloraError
from cmlora.originals import translate
from tests import families, trainers
from tests.formats.cases import CASES, noise

MIDDLE = ("double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.0", "single_blocks.0.linear1")
LAST = (
    "double_blocks.0.img_attn.proj",
    "double_blocks.0.img_mlp.2",
    "double_blocks.1.txt_mlp.2",
    "single_blocks.2.linear2",
)
FORMS = ("lora", "loha", "lokr", "lokr_whole", "lokr_both", "full", "glora")


def layers_of(model: nn.Module, name: str, table: str) -> list[nn.Linear]:
    """The layers that are one in the original."""
    found = translate(name, table)
    assert found is not None
    layers = [model.get_submodule(module) for module in found[0]]
    return [layer for layer in layers if isinstance(layer, nn.Linear)]


def shape_of(model: nn.Module, name: str, table: str) -> tuple[int, int]:
    layers = layers_of(model, name, table)
    return sum(layer.out_features for layer in layers), layers[0].in_features


def file(model: Any, names: tuple[str, ...], form: str) -> dict[str, Tensor]:
    """Changes of layers of a FLUX.2, as ai-toolkit names them."""
    stored: dict[str, Tensor] = {}
    for name in names:
        made = CASES[form].make(shape_of(model, name, "flux2"))
        made.pop("diff_b", None)
        stored |= {f"diffusion_model.{name}.{end}": tensor for end, tensor in made.items()}
    return stored


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    result: Tensor = model(
        hidden_states=torch.randn(1, 9, 16, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 16, generator=generator),
        timestep=torch.tensor([0.4]),
        guidance=torch.tensor([3.0]),
        img_ids=torch.zeros(9, 4),
        txt_ids=torch.zeros(5, 4),
    ).sample
    return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("kind", "table"), [(FluxTransformer2DModel, "flux"), (Flux2Transformer2DModel, "flux2")]
)
def test_one_layer_of_the_real_model_tells_which_it_is(kind: Any, table: str, form: str) -> None:
    with torch.device("meta"):
        model = kind(num_layers=1, num_single_layers=1)
        for name in (
            "double_blocks.0.img_mlp.0",
            "double_blocks.0.txt_mlp.2",
            "single_blocks.0.linear1",
            "single_blocks.0.linear2",
        ):
            made = CASES[form].make(shape_of(model, name, table))
            for stem in (f"diffusion_model.{name}", f"lora_unet_{name.replace('.', '_')}"):
                shapes = {f"{stem}.{end}": tuple(tensor.shape) for end, tensor in made.items()}
                assert keys.layout(shapes, shapes=shapes).table == table


@pytest.mark.parametrize("names", [MIDDLE + LAST, LAST, LAST[-1:]])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_original_names(form: str, names: tuple[str, ...], tmp_path: Path) -> None:
    base, pipe = families.flux2().pipe.transformer, families.flux2().pipe
    torch.manual_seed(0)
    stored = file(base, names, form)
    path = trainers.save(stored, tmp_path / "x.safetensors")
    assert files.describe(path)["family"] == "FLUX.2"
    before = outputs(base)
    with torch.no_grad():
        for name in names:
            start = f"diffusion_model.{name}."
            tensors = {k.removeprefix(start): t for k, t in stored.items() if k.startswith(start)}
            layers = layers_of(base, name, "flux2")
            delta = CASES[form].delta(tensors, torch.cat([layer.weight for layer in layers]))
            parts = torch.split(delta, [layer.out_features for layer in layers])
            for layer, part in zip(layers, parts, strict=True):
                layer.weight.add_(part)
    files.load(pipe, path, "x")
    expected = outputs(base)
    assert float((expected - before).abs().max()) > 1e-3
    torch.testing.assert_close(outputs(pipe.transformer), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["lora", "lokr", "lokr_whole"])
def test_diffusers_own_converter_agrees(form: str, tmp_path: Path) -> None:
    ours, theirs = families.flux2().pipe, families.flux2().pipe
    torch.manual_seed(0)
    stored = file(ours.transformer, LAST, form)
    path = trainers.save(stored, tmp_path / "x.safetensors")
    plain = stored
    if form == "lora":  # whose alpha it does not take with these names
        plain = {}
        for key, tensor in stored.items():
            stem = key.partition(".lora_")[0]
            if key.endswith("lora_down.weight"):
                plain[f"{stem}.lora_A.weight"] = tensor
            elif key.endswith("lora_up.weight"):
                plain[f"{stem}.lora_B.weight"] = tensor * stored[f"{stem}.alpha"] / tensor.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.load_lora_weights(plain, adapter_name="x")
    before = outputs(ours.transformer)
    files.load(ours, path, "x")
    found = outputs(ours.transformer)
    assert float((found - before).abs().max()) > 1e-3
    torch.testing.assert_close(found, outputs(theirs.transformer), rtol=1e-3, atol=1e-4)


def test_the_model_decides_where_shapes_do_not(tmp_path: Path) -> None:
    pipe = families.flux2().pipe
    torch.manual_seed(0)
    stem = "diffusion_model.double_blocks.0.img_mlp.2"
    rows, columns = shape_of(pipe.transformer, "double_blocks.0.img_mlp.2", "flux2")
    stored = {f"{stem}.weight": noise(columns), f"{stem}.on_input": torch.tensor(1)}
    path = trainers.save(stored, tmp_path / "x.safetensors")
    before = outputs(pipe.transformer)
    assert files.load(pipe, path, "x").modules == 1
    layer = families.flux2().pipe.transformer
    with torch.no_grad():
        weight = layer.get_submodule("transformer_blocks.0.ff.linear_out").weight
        assert weight.shape == (rows, columns)
        weight.mul_(1 + stored[f"{stem}.weight"])
    assert not torch.allclose(outputs(layer), before, atol=1e-5)
    torch.testing.assert_close(outputs(pipe.transformer), outputs(layer), rtol=1e-4, atol=1e-5)


def test_a_flux1_file_is_still_one(tmp_path: Path) -> None:
    stem = "diffusion_model.single_blocks.0.linear2"
    stored = {f"{stem}.lora_A.weight": noise(2, 80), f"{stem}.lora_B.weight": noise(16, 2)}
    path = trainers.save(stored, tmp_path / "x.safetensors")
    with pytest.raises(CmloraError, match=r"is for FLUX\.1 and the pipeline is FLUX\.2"):
        files.load(families.flux2().pipe, path, "x")
    assert files.load(families.flux().pipe, path, "x").modules == 1


@pytest.mark.parametrize(("width", "title"), [(3072, "FLUX.1"), (4096, "FLUX.2"), (6144, "FLUX.2")])
def test_attention_alone_tells_by_its_width(width: int, title: str, tmp_path: Path) -> None:
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    stored = {f"{stem}.lora_down.weight": noise(1, width)}
    stored[f"{stem}.lora_up.weight"] = noise(width, 1)
    assert files.describe(trainers.save(stored, tmp_path / "x.safetensors"))["family"] == title
