"""Layers of which a file has a LoRA and a whole difference: both are what the file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmlora import files
from cmlora.errors import CmloraError
from tests import families, tiny, trainers

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
SHAPES: dict[str, tuple[int, ...]] = {
    f"unet.{TO_Q}": (8, 8),
    f"unet.{CONV}": (16, 16, 3, 3),
    f"text_encoder.{TEXT}": (16, 16),
}


def stored() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file, and the whole update of each module."""
    torch.manual_seed(2)
    tensors: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    for module, shape in SHAPES.items():
        component, _, name = module.partition(".")
        prefix = "lora_te_" if component == "text_encoder" else "lora_unet_"
        stem = prefix + name.replace(".", "_")
        down, up, diff = torch.randn(2, *shape[1:]), torch.randn(shape[0], 2), torch.randn(shape)
        ones = [1] * (len(shape) - 2)
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up.reshape(*up.shape, *ones),
            f"{stem}.alpha": torch.tensor(1.0),
            f"{stem}.diff": diff,
        }
        sums[module] = 0.5 * (up @ down.flatten(1)).reshape(shape) + diff
    return tensors, sums


def test_reading_adds_them(tmp_path: Path) -> None:
    tensors, sums = stored()
    lora = files.read(trainers.save(tensors, tmp_path / "x.safetensors"))
    assert lora.updates.keys() == sums.keys()
    for module, expected in sums.items():
        torch.testing.assert_close(lora.updates[module].delta(), expected)


@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize("rank", [None, 3])
def test_converting_adds_them(model: bool, rank: int | None, tmp_path: Path) -> None:
    tensors, sums = stored()
    path = trainers.save(tensors, tmp_path / "x.safetensors")
    lora, error = files.convert(path, tiny.sd15() if model else None, rank=rank)
    total = sum(float(each.norm()) ** 2 for each in sums.values())
    lost = 0.0
    for module, expected in sums.items():
        delta = lora.updates[module].delta()
        assert delta.shape == expected.shape
        lost += float((delta - expected).norm()) ** 2
        if rank is None:
            torch.testing.assert_close(delta, expected)
        else:
            best = torch.linalg.svdvals(expected.flatten(1).double())[rank:].norm()
            assert float((delta - expected).norm()) == pytest.approx(float(best), rel=1e-4)
    assert error == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-6)


def test_a_fused_layer_is_read_as_it_is_loaded(tmp_path: Path) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    torch.manual_seed(3)
    down, up, diff = torch.randn(2, 16), torch.randn(48, 2), torch.randn(48, 16)
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(2.0),
        f"{name}.diff": diff,
    }
    path = trainers.save(tensors, tmp_path / "x.safetensors")
    deltas = files.read(path).deltas()
    expected = dict(zip(("to_q", "to_k", "to_v"), torch.split(up @ down + diff, 16), strict=True))
    pipe: Any = families.flux().pipe
    files.load(pipe, path, "x")
    x = torch.randn(3, 16)
    for last, delta in expected.items():
        module = f"transformer_blocks.0.attn.{last}"
        torch.testing.assert_close(deltas[f"transformer.{module}"], delta)
        layer = pipe.transformer.get_submodule(module)
        base = layer.get_base_layer()
        torch.testing.assert_close(layer(x) - base(x), x @ delta.T, rtol=1e-4, atol=1e-4)


def test_two_of_different_layers_are_an_error(tmp_path: Path) -> None:
    tensors, _ = stored()
    key = f"lora_unet_{TO_Q.replace('.', '_')}.diff"
    for shape in ((8, 4), (8,), ()):
        path = trainers.save(tensors | {key: torch.ones(shape)}, tmp_path / "x.safetensors")
        with pytest.raises(CmloraError, match=r"its LoRA is \(8, 8\) and its difference"):
            files.read(path)
