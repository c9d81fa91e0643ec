"""Names whose parts are joined by underscores, read with a model at hand and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from cmlora import files
from cmlora.names import Context, target
from cmlora.originals import TABLES, translate
from tests import families, trainers
from tests.formats.cases import noise

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "aura_flow": (
        "AuraFlowTransformer2DModel",
        {"num_mmdit_layers": 2, "num_single_dit_layers": 2},
    ),
    "chroma": ("ChromaTransformer2DModel", {"num_layers": 2, "num_single_layers": 2}),
    "flux": ("FluxTransformer2DModel", {"num_layers": 2, "num_single_layers": 2}),
    "flux2": ("Flux2Transformer2DModel", {"num_layers": 2, "num_single_layers": 2}),
    "hunyuan": ("HunyuanVideoTransformer3DModel", {"num_layers": 2, "num_single_layers": 2}),
    "ltx": ("LTXVideoTransformer3DModel", {"num_layers": 2}),
    "lumina2": ("Lumina2Transformer2DModel", {"num_layers": 2, "num_refiner_layers": 2}),
    "pixart": ("PixArtTransformer2DModel", {"num_layers": 2, "sample_size": 8}),
    "sd3": ("SD3Transformer2DModel", {"num_layers": 2}),
    "wan": ("WanTransformer3DModel", {"num_layers": 2, "image_dim": 8, "added_kv_proj_dim": 8}),
    "z_image": ("ZImageTransformer2DModel", {"n_layers": 2}),
}
"""The models of the families by the tables of their original names, in the real widths."""


def model(name: str, options: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        made: nn.Module = getattr(diffusers, name)(**options)
    return made


def contexts(of: nn.Module, table: str | None) -> tuple[Context, Context]:
    """Without the model and with it."""
    names = {name.replace(".", "_"): name for name, _ in of.named_modules()}
    return Context(table=table), Context(table=table, modules=names)


@pytest.mark.parametrize("table", TABLES)
def test_original_names_mean_the_same_with_the_model(table: str) -> None:
    plain, known = contexts(model(*SMALL[table]), table)
    lines = [line.partition(" = ")[0] for line in TABLES[table].splitlines() if " = " in line]
    for name in {line.strip().replace("#", "1") for line in lines}:
        stem = f"lora_unet_{name.replace('.', '_')}"
        found, told = target(stem, plain), translate(name, table)
        assert found is not None, name
        assert told is not None
        assert found.modules == tuple(f"transformer.{each}" for each in told[0])
        assert target(stem, known) == found, name


@pytest.mark.parametrize("make", families.FAMILIES.values())
def test_diffusers_names_mean_the_same_with_the_model(make: Callable[[], families.Family]) -> None:
    for denoiser in make().models():
        plain, known = contexts(denoiser, None)
        for module, layer in denoiser.named_modules():
            if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                continue
            stem = f"lora_unet_{module.replace('.', '_')}"
            with_model, without = target(stem, known), target(stem, plain)
            assert with_model is not None
            assert with_model.modules[0].partition(".")[2] == module
            assert without is None or without == with_model


@pytest.mark.parametrize("ending", ["w_norm", "diff"])
def test_the_norm_of_wan_that_has_another_number(ending: str, tmp_path: Path) -> None:
    pipe = families.wan().pipe
    norm = pipe.transformer.blocks[0].norm2
    torch.manual_seed(0)
    stored = {
        f"lora_unet_blocks_0_norm3.{ending}": noise(24),
        "lora_unet_blocks_0_self_attn_q.lora_down.weight": noise(2, 24),
        "lora_unet_blocks_0_self_attn_q.lora_up.weight": noise(24, 2),
    }
    path = trainers.save(stored, tmp_path / "x.safetensors")

    def normed() -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = pipe.transformer.blocks[0].norm2(torch.arange(24.0)[None])
        return result

    before = normed()
    shift = stored[f"lora_unet_blocks_0_norm3.{ending}"]
    expected = before / norm.weight.detach() * (norm.weight.detach() + shift)
    assert files.load(pipe, path, "x").modules == 2
    torch.testing.assert_close(normed(), expected, rtol=1e-4, atol=1e-5)
