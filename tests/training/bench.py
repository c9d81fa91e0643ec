"""Small trainings for the tests."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmlora.adapters.training import Example, Settings, Trainer, read_folder
from tests import tiny

PICTURES = 5


def pipeline() -> Any:
    """The smallest Stable Diffusion there is."""
    return tiny.sd15(channels=(8, 16), layers_per_block=1)


def pictures(folder: Path, count: int = PICTURES, size: tuple[int, int] = (32, 32)) -> Path:
    """A folder of pictures with captions in text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        pixels = rng.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a cat {number}")
    return folder


def settings(output: Path, **options: Any) -> Settings:
    """Settings for `pipeline`."""
    plain: dict[str, Any] = {
        "output": str(output),
        "resolution": 32,
        "bucket_step": 16,
        "steps": 4,
        "batch": 2,
        "rank": 2,
        "rate": 1e-2,
        "targets": ("to_q", "to_v", "conv1"),
        "name": "ink",
        "trigger": "zorbo",
    }
    return Settings(**plain | options)


def trainer(folder: Path, pipe: Any = None, **options: Any) -> Trainer:
    """A training of the pictures in ``folder / "data"``."""
    examples: list[Example] = read_folder(folder / "data", "zorbo")
    pipe = pipeline() if pipe is None else pipe
    return Trainer(pipe, settings(**{"output": folder / "out"} | options), examples)


def stop_at(step: int) -> Any:
    """Ends a training after a step, as if the machine had been switched off."""

    def progress(done: int, loss: float) -> None:
        if done == step:
            raise ConnectionError

    return progress
