"""`cmlora inspect` and `cmlora convert` on files of several forms and trainers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cmlora import container, files
from cmlora.cli.app import app
from cmlora.describe import trainer
from tests import tiny, trainers
from tests.formats.cases import CASES

TO_Q = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def inspect(path: Path) -> Any:
    result = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    return found


def stored(form: str, stem: str = f"lora_unet_{TO_Q}") -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = CASES[form].make((8, 8))
    tensors.pop("diff_b", None)
    return {f"{stem}.{end}": tensor for end, tensor in tensors.items()}


def test_a_file_of_several_forms(tmp_path: Path) -> None:
    held = {
        **stored("dora"),
        **stored("lora", "lora_unet_mid_block_attentions_0_proj_in"),
        **stored("lora", "lora_te_text_model_encoder_layers_0_self_attn_q_proj"),
        "lora_unet_strange.lora_up.weight": torch.ones(1),
    }
    path = trainers.save(
        held,
        tmp_path / "x.safetensors",
        ss_network_module="networks.lora",
        **{"modelspec.trigger_phrase": "sks"},
    )
    found = inspect(path)
    assert found["trainer"] == "kohya (networks.lora)"
    assert found["forms"] == ["LoRA", "DoRA"]
    assert found["triggers"] == ["sks"]
    assert found["text_encoder"]
    assert found["modules"] == {"text_encoder": 1, "unet": 2}
    assert (found["rank"], found["alpha"]) == ([3, 3], [2.0, 2.0])
    block = {"modules": 1, "rank": [3], "alpha": [2.0]}
    assert found["blocks"] == {
        "text_encoder.text_model.encoder.layers.0": block,
        "unet.down_blocks.0.attentions.0": block,
        "unet.mid_block": block,
    }
    assert found["leftover"] == {"lora_unet_strange.lora_up.weight": "unknown name"}
    assert found["use"]["low_rank"] == 2
    assert found["use"]["with_model"] == 1
    assert found["use"]["refused"] == 1
    assert found["autov3"] == container.sha256(path, container.header(path).start)[:12]
    shown = CliRunner().invoke(app, ["inspect", str(path), "--no-diffusers"])
    assert shown.exit_code == 0
    words = "".join(shown.stdout.replace("\u2502", " ").split())
    assert "workedoutwiththemodel" in words


def test_what_plain_diffusers_does_is_found_out(tmp_path: Path) -> None:
    plain = inspect(trainers.save(stored("lora"), tmp_path / "lora.safetensors"))["diffusers"]
    assert plain == {
        "pipeline": "StableDiffusionPipeline",
        "loads": True,
        "error": None,
        "dropped": [],
    }
    dora = inspect(trainers.save(stored("dora"), tmp_path / "dora.safetensors"))["diffusers"]
    assert dora["dropped"] == [f"lora_unet_{TO_Q}.dora_scale"]
    loha = inspect(trainers.save(stored("loha"), tmp_path / "loha.safetensors"))["diffusers"]
    assert loha["loads"] is False
    assert loha["error"]


@pytest.mark.parametrize(
    ("metadata", "key", "name"),
    [
        ({"ot_config": "{}"}, "x", "OneTrainer"),
        ({"software": '{"name": "ai-toolkit"}'}, "x", "ai-toolkit"),
        ({"ss_network_module": "networks.lora_wan"}, "x", "musubi (networks.lora_wan)"),
        ({}, "double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
        ({}, "double_blocks.0.img_attn.norm.query_norm.scale", "Black Forest Labs"),
        ({}, "lycoris_transformer_blocks_0_attn_to_q.lokr_w1", "LyCORIS"),
        ({}, "lora_transformer_x.alpha", "OneTrainer"),
        ({}, "lora_unet_x.alpha", "kohya"),
        ({}, "unet.x.lora_A.weight", "diffusers or PEFT"),
        ({}, "x", "unknown"),
    ],
)
def test_trainers_are_told_by_header_or_names(
    metadata: dict[str, str], key: str, name: str
) -> None:
    assert trainer(metadata, [key]).startswith(name)


def test_convert_needs_the_model_only_where_it_must(model_folder: Path, tmp_path: Path) -> None:
    loha = trainers.save(stored("loha"), tmp_path / "loha.safetensors")
    target = tmp_path / "out.safetensors"
    result = CliRunner().invoke(app, ["convert", str(loha), "-o", str(target), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["relative_error"] == 0.0
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = tiny.sd15().unet.get_submodule(module.removeprefix("unet.")).weight.detach()
    tensors = {k.rpartition(f"{TO_Q}.")[2]: t for k, t in stored("loha").items()}
    expected = CASES["loha"].delta(tensors, weight)
    torch.testing.assert_close(files.read(target).updates[module].delta(), expected)
    dora = trainers.save(stored("dora"), tmp_path / "dora.safetensors")
    arguments = ["convert", str(dora), "-o", str(target), "--rank", "2", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--model", str(model_folder)])
    assert result.exit_code == 0, result.output
    assert 0 < json.loads(result.stdout)["relative_error"] < 1
    tensors = {k.rpartition(f"{TO_Q}.")[2]: t for k, t in stored("dora").items()}
    expected = CASES["dora"].delta(tensors, weight)
    found = files.read(target).updates[module].delta()
    best = torch.linalg.svdvals(expected)[2:].norm()
    assert float((found - expected).norm()) == pytest.approx(float(best), rel=1e-3)
