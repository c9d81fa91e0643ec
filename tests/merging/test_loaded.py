"""L10 over the registry: a pipeline that loads a merged file computes W + D."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cmlora.adapters.merging import MERGES, merge
from cmlora.files import write
from cmlora.lora import LoRA, Update
from tests import tiny


@pytest.fixture(scope="module")
def tiny_loras() -> list[LoRA]:
    """LoRAs of two ranks for the tiny UNet and text encoder, convolutions included."""
    pipe = tiny.sd15()
    wanted = (".attn1.to_q", ".attn2.to_k", ".proj_in", "conv1", "ff.net.2")
    layers = {
        f"unet.{name}": layer.weight.shape
        for name, layer in pipe.unet.named_modules()
        if name.endswith(wanted) and name.startswith(("down_blocks.1", "mid"))
    }
    for name, layer in pipe.text_encoder.named_modules():
        if name.endswith("q_proj"):
            key = f"text_encoder.text_model.{name.removeprefix('text_model.')}"
            layers[key] = layer.weight.shape
    found = []
    for seed, (name, rank) in enumerate({"a": 3, "b": 2}.items()):
        generator = torch.Generator().manual_seed(seed)
        updates = {
            key: Update(
                0.3 * torch.randn((rank, *shape[1:]), generator=generator),
                0.3 * torch.randn((shape[0], rank), generator=generator),
                0.7,
            )
            for key, shape in layers.items()
        }
        found.append(LoRA(name, updates))
    return found


@pytest.fixture(scope="module")
def pipes() -> tuple[Any, Any]:
    """One to load files into, and one that stays as it is."""
    return tiny.sd15(), tiny.sd15()


@pytest.mark.parametrize("method", [m for m in MERGES if "L10" in MERGES[m].object.laws])
def test_a_pipeline_computes_the_weight_and_the_update(
    method: str, tiny_loras: list[LoRA], pipes: tuple[Any, Any], tmp_path: Path
) -> None:
    loaded, plain = pipes
    loras = (
        tiny_loras
        if "L7" in MERGES[method].object.laws
        else [tiny_loras[0], replace(tiny_loras[0], name="b")]
    )
    options: dict[str, Any] = {}
    if MERGES[method].object.needs_grams:
        eyes = {m: torch.eye(math.prod(u.shape[1:])) for m, u in loras[0].updates.items()}
        options["grams"] = {lora.name: eyes for lora in loras}
    merged = merge(loras, [0.8, 0.6], method, **options).lora
    write(merged, tmp_path / "m.safetensors")
    loaded.load_lora_weights(str(tmp_path / "m.safetensors"))
    added = {part: copy.deepcopy(getattr(plain, part)) for part in ("unet", "text_encoder")}
    for part, changes in merged.parts.items():
        model = added[part]
        for name, update in changes.items():
            own = name if part == "unet" else _own(model, name)
            weight = model.get_submodule(own).weight
            weight.data += update.delta().reshape(weight.shape)
    x, tokens = tiny.latents(), torch.arange(16)[None]
    with torch.no_grad():
        texts = [model(tokens)[0] for model in (loaded.text_encoder, added["text_encoder"])]
        models = (loaded.unet, added["unet"], plain.unet)
        outs = [unet(x, 10, t).sample for unet, t in zip(models, (*texts, texts[1]), strict=True)]
    loaded.unload_lora_weights()
    for one, other in (texts, outs[:2]):
        assert float((one - other).norm()) < 1e-4 * float(other.norm())
    assert float((outs[1] - outs[2]).norm()) > 1e-3 * float(outs[2].norm())


def _own(model: Any, name: str) -> str:
    return name if hasattr(model, "text_model") else name.removeprefix("text_model.")
