"""Every example runs, on the tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_it_draws(script: Path, model_folder: Path, lora_folder: Path, tmp_path: Path) -> None:
    loras = [str(lora_folder / f"{name}.safetensors") for name in ("cat", "hat")]
    command = [sys.executable, str(script), str(model_folder), *loras]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 0, ended.stderr
    drawn = list(tmp_path.glob("*.png"))
    assert drawn
    assert "passes" in ended.stdout
    for path in drawn:
        with Image.open(path) as image:
            assert image.size == (32, 32)
