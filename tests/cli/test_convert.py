"""`cmlora convert` on files of another family, and on LoRAs as diffusers writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from cmlora import files
from cmlora.errors import CmloraError
from tests import tiny, trainers
from tests.calling import complaint, run, run_json
from tests.formats.cases import CASES

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def flux(folder: Path) -> Path:
    """A LoRA of all blocks of FLUX.1, of which one layer is a DoRA."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for block in range(19):
        stem = f"transformer.transformer_blocks.{block}.attn.to_q"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(1, 3072)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(3072, 1)
    first = "transformer.transformer_blocks.0.attn.to_q"
    tensors[f"{first}.lora_magnitude_vector"] = torch.rand(3072) + 1
    return trainers.save(tensors, folder / "flux.safetensors")


@pytest.mark.parametrize("loose", [(), ("--loose",)])
def test_a_file_of_another_family_names_both_and_the_model(
    loose: Iterable[str], model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "never.safetensors"
    said = complaint(["convert", flux(tmp_path), "-o", out, "--model", model_folder, *loose])
    assert "is for FLUX.1 and the pipeline is a UNet for text of width 16" in said
    assert "transformer.transformer_blocks.0.attn.to_q is not in the pipeline" in said
    assert "--model" in said
    assert "strict" not in said
    assert not out.exists()


@pytest.mark.parametrize("loose", [(), ("--loose",)])
def test_a_layer_of_another_size_names_the_model_too(
    loose: Iterable[str], model_folder: Path, tmp_path: Path
) -> None:
    name = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = CASES["dora"].make((8, 2048))
    stored = {f"lora_unet_{name}.{end}": tensor for end, tensor in tensors.items()}
    path = trainers.save(stored, tmp_path / "xl.safetensors")
    out = tmp_path / "never.safetensors"
    said = complaint(["convert", path, "-o", out, "--model", model_folder, *loose])
    assert "is for Stable Diffusion XL and the pipeline is a UNet for text of width 16" in said
    assert "--model" in said


def test_a_header_of_another_family_is_believed(tmp_path: Path) -> None:
    pipe = tiny.sd15()
    pipe.unet.register_to_config(cross_attention_dim=768)
    tensors = CASES["dora"].make((8, 8))
    stored = {f"lora_unet_{TO_Q.replace('.', '_')}.{end}": t for end, t in tensors.items()}
    header = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    path = trainers.save(stored, tmp_path / "x.safetensors", **header)
    with pytest.raises(CmloraError, match=r"XL and the pipeline is Stable Diffusion 1\.x.*header"):
        files.convert(path, pipe)
    with pytest.warns(UserWarning, match="although its header says"):
        assert files.convert(path, pipe, strict=False)[0].updates


def headed(folder: Path, **extra: Tensor) -> Path:
    """A LoRA with the header that diffusers writes today."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"]).to_dict()
    table = {f"unet.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    torch.manual_seed(0)
    stored = {
        f"unet.{TO_Q}.lora_A.weight": torch.randn(2, 8),
        f"unet.{TO_Q}.lora_B.weight": torch.randn(8, 2),
        **extra,
    }
    text = json.dumps(table, default=str)
    assert "peft_type" in text
    return trainers.save(stored, folder / "x.safetensors", lora_adapter_metadata=text)


def test_a_lora_of_diffusers_needs_no_model_for_an_unknown_key(tmp_path: Path) -> None:
    path, out = headed(tmp_path, **{"foo.bar": torch.ones(2)}), tmp_path / "out.safetensors"
    said = complaint(["convert", path, "-o", out])
    assert "1 of 3 keys left over: foo.bar (unknown name); --loose leaves them out" in said
    assert not out.exists()
    facts: Any = run_json("convert", path, "-o", out, "--loose")
    assert facts["modules"] == 1
    expected = files.read(headed(tmp_path)).updates[f"unet.{TO_Q}"]
    found = files.read(out).updates[f"unet.{TO_Q}"]
    assert found.scale == expected.scale == 2.0
    assert torch.equal(found.delta(), expected.delta())


def test_what_is_left_out_is_said(model_folder: Path, tmp_path: Path) -> None:
    """Of the model's own family: a layer that it does not have."""
    tensors = CASES["dora"].make((8, 8))
    stems = (f"lora_unet_{TO_Q.replace('.', '_')}", "lora_unet_mid_block_attentions_7_proj_in")
    stored = {f"{stem}.{end}": t.clone() for stem in stems for end, t in tensors.items()}
    path, out = trainers.save(stored, tmp_path / "x.safetensors"), tmp_path / "out.safetensors"
    said = complaint(["convert", path, "-o", out, "--model", model_folder])
    assert "mid_block.attentions.7.proj_in (it is not in the pipeline); --loose leaves" in said
    run("convert", path, "-o", out, "--model", model_folder, "--loose")
    assert list(files.read(out).updates) == [f"unet.{TO_Q}"]
