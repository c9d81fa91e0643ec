"""Models and LoRAs by name, and what is said when they are not there."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from torch import zeros

from cmlora.errors import CmloraError
from cmlora.pipelines import library
from cmlora.pipelines.models import locate, open_pipeline
from tests import disk, tiny
from tests.single_file import save_single_file


def test_a_folder_a_file_and_a_hub_id(model_folder: Path, tmp_path: Path) -> None:
    single = tmp_path / "model.safetensors"
    single.touch()
    assert locate(model_folder) == model_folder
    assert locate(str(single)) == single
    assert locate("owner/name") == "owner/name"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_model", "give 'emoji', a diffusers folder"),
        ("./owner/name", "no model"),
        ("a/b/c", "no model"),
        ("", "no diffusers model|no model"),
    ],
)
def test_missing(name: str, message: str) -> None:
    with pytest.raises(CmloraError, match=message):
        locate(name)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(CmloraError, match=r"no model_index\.json"):
        locate(tmp_path)


def test_pickled_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.touch()
    with pytest.raises(CmloraError, match="can run code"):
        locate(path)


def test_a_lora_is_not_a_model(lora_folder: Path) -> None:
    with pytest.raises(CmloraError, match=r"is no Stable Diffusion checkpoint.*--lora"):
        open_pipeline(lora_folder / "cat.safetensors")


def test_a_broken_folder_is_named(tmp_path: Path) -> None:
    folder = disk.save_model(tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CmloraError, match="could not be loaded as a diffusers model"):
        open_pipeline(folder)


def test_a_single_file_without_its_family_at_hand(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": zeros(4, 4, 3, 3)}, path)
    with pytest.raises(CmloraError, match="folder of a diffusers model of the same family"):
        open_pipeline(path, config=str(tmp_path), local_files_only=True)


def test_loras_by_name(lora_folder: Path) -> None:
    expected = lora_folder / "cat.safetensors"
    assert library.find(expected) == expected
    assert library.find("cat", folder=lora_folder) == expected
    assert library.find("cat.safetensors", folder=lora_folder) == expected


def test_near_names_are_told(lora_folder: Path) -> None:
    with pytest.raises(CmloraError, match="did you mean cat"):
        library.find("cta", folder=lora_folder)
    with pytest.raises(CmloraError, match="'cat' not found; there is no such file"):
        library.find("cat")
    with pytest.raises(CmloraError, match="this is a folder"):
        library.find(lora_folder)
    with pytest.raises(CmloraError, match=r"LoRA folder .* does not exist"):
        library.find("cat", folder=lora_folder / "none")


def test_a_single_file_is_the_same_model(model_folder: Path, tmp_path: Path) -> None:
    path = save_single_file(tiny.sd15(), tmp_path / "model.safetensors")
    single = open_pipeline(path, config=model_folder, local_files_only=True)
    whole = open_pipeline(model_folder)
    pictures = []
    for pipe in (single, whole):
        pipe.scheduler = whole.scheduler
        pipe.safety_checker = None
        pictures.append(tiny.run(pipe, output_type="np"))
    np.testing.assert_allclose(pictures[0], pictures[1], atol=1e-6)
