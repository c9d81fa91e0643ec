"""The single-class files, loaded the way diffusers loads them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline

from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from tests import tiny

ROOT = Path(__file__).parents[2]
CALL: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np", "seed": 2}


def custom(model: Path, file: str) -> Any:
    return DiffusionPipeline.from_pretrained(
        model, custom_pipeline=str(ROOT / "pipelines" / file), trust_remote_code=True
    )


@pytest.fixture(autouse=True)
def own_module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers copies the file into a cache; keep that out of the user's."""
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))


def test_sd15_is_the_same_engine(model_folder: Path, lora_folder: Path) -> None:
    ours, theirs = CMLoRAPipeline.from_pretrained(model_folder), custom(model_folder, "sd15.py")
    for pipe in (ours, theirs):
        for name in ("cat", "hat"):
            pipe.load_lora_weights(lora_folder / f"{name}.safetensors")
    output = theirs("a cat", composition="composite", **CALL)
    expected = ours("a cat", composition="composite", **CALL)
    np.testing.assert_array_equal(output.images, expected.images)
    assert output.report.full == {"cat": 4, "hat": 4}
    theirs.unload_lora_weights()
    base = theirs("a cat", composition="naive", **CALL).images
    assert np.abs(base - output.images).max() > 1e-3


def test_sdxl_loads_and_draws(tmp_path: Path) -> None:
    tiny.sdxl().save_pretrained(tmp_path / "xl")
    pipe = custom(tmp_path / "xl", "sdxl.py")
    images = pipe("a cat", composition="naive", **CALL).images
    assert images.shape == (1, 32, 32, 3)
    assert type(pipe).__name__ == "CMLoRAStableDiffusionXLPipeline"
