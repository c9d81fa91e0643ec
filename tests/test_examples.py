"""Every example runs, on the tiny model."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_it_draws(
    script: Path,
    model_folder: Path,
    lora_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loras = [str(lora_folder / f"{name}.safetensors") for name in ("cat", "hat")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), str(model_folder), *loras, "4"])
    runpy.run_path(str(script), run_name="__main__")
    drawn = list(tmp_path.glob("*.png"))
    assert drawn
    assert "passes" in capsys.readouterr().out
    for path in drawn:
        with Image.open(path) as image:
            assert image.size == (32, 32)
