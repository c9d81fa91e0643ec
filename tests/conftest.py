"""Fixtures that several test files share."""

import gc
from pathlib import Path

import pytest
from hypothesis import settings

from tests import disk

# a loaded machine is no failure, and a failure is the same on every machine
settings.register_profile("patient", deadline=None, derandomize=True)
settings.load_profile("patient")


def pytest_collection_finish() -> None:
    """Leaves what was imported out of garbage collection, which else takes 7 % of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1.5 model as a diffusers folder; read only."""
    return disk.save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA files `cat`, `hat` and `ink` for the tiny model; read only."""
    folder = tmp_path_factory.mktemp("loras")
    for name in ("cat", "hat", "ink"):
        disk.save_lora(folder, name)
    return folder
