"""A server's state with the tiny model and LoRAs."""

from pathlib import Path

import pytest

from cmlora.ui.settings import Settings
from cmlora.ui.studio import Studio


@pytest.fixture
def studio(model_folder: Path, lora_folder: Path, tmp_path: Path) -> Studio:
    """A studio of its own: nothing is loaded, the output folder is empty."""
    return Studio(Settings(models=(model_folder,), loras=(lora_folder,), out=tmp_path / "out"))


@pytest.fixture(scope="module")
def warm(model_folder: Path, lora_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """A studio that the tests of a file share, so that the model is loaded once."""
    out = tmp_path_factory.mktemp("warm") / "out"
    return Studio(Settings(models=(model_folder,), loras=(lora_folder,), out=out))
