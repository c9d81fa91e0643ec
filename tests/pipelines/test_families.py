"""`CMLoRAPipeline` around transformers, with LoRA files as diffusers saves them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from cmlora.errors import CmloraError
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.pipelines.ensemble import default_cache
from tests import families


def saved(family: families.Family, name: str, folder: Path) -> Path:
    """A LoRA of the family's denoiser as a file; it says nothing of alpha, which was 1.5 ranks."""
    layers = get_peft_model_state_dict(family.models()[0], adapter_name=name)
    path = folder / f"{name}.safetensors"
    if hasattr(family.pipe, "save_lora_weights"):
        type(family.pipe).save_lora_weights(
            folder, transformer_lora_layers=layers, weight_name=path.name
        )
    else:
        stored = {f"transformer.{key}": tensor.contiguous() for key, tensor in layers.items()}
        save_file(stored, path, {"format": "pt"})
    return path


@pytest.mark.parametrize("name", ["flux", "flux2", "pixart", "qwen", "sana", "sd3"])
def test_files_are_loaded_and_composed(name: str, tmp_path: Path) -> None:
    family = families.family(name)
    files = [saved(family, lora, tmp_path) for lora in families.NAMES]
    families.activate(family.models()[0], "ink")
    family.models()[0].requires_grad_(False)
    expected = family.run()
    fresh = families.FAMILIES[name]()
    base = fresh.run()
    fresh.pipe.set_progress_bar_config(disable=True)
    pipe = CMLoRAPipeline(fresh.pipe)
    for file in files:
        pipe.load_lora_weights(file, weight=1.5)

    def draw(**options: Any) -> torch.Tensor:
        fresh.pipe, kept = pipe, fresh.pipe  # so that the wrapper is called
        try:
            return fresh.run(**options)
        finally:
            fresh.pipe = kept

    single = {"composition": "composite", "cache": "none"}
    result = draw(lora_weights={"ink": 1.5}, **single)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    half = draw(lora_weights={"ink": 1.5}, lora_scale=0.5, **single)
    quarter = draw(lora_weights={"ink": 0.75}, **single)
    torch.testing.assert_close(half, quarter, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(half, result, atol=1e-3)
    for other in ({"composition": "gate"}, {"composition": "merge", "execution": "fused"}):
        whole, less = dict.fromkeys(families.NAMES, 1.5), dict.fromkeys(families.NAMES, 0.75)
        half = draw(lora_weights=whole, lora_scale=0.5, **other)
        torch.testing.assert_close(half, draw(lora_weights=less, **other), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(draw(composition="cmlora")).all()
    assert default_cache("cmlora", fresh.pipe, []) == "nonuniform"
    assert pipe.report is not None
    assert pipe.report.light
    pipe.delete_adapters("ink")
    with pytest.raises(CmloraError, match="no LoRA 'ink' is loaded"):
        draw(lora_weights={"ink": 1.5}, **single)
    pipe.load_lora_weights(files[0], weight=1.5)
    torch.testing.assert_close(draw(lora_weights={"ink": 1.5}, **single), result)
    pipe.unload_lora_weights()
    assert torch.equal(fresh.run(), base)
