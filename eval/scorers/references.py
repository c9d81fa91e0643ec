"""Pictures of what each LoRA draws, to compare with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cmlora.errors import CmloraError
from cmlora.eval.manifest import Manifest
from cmlora.eval.scorers.clip_model import EMBEDDED

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
RENDERS = 8
"""Pictures that are drawn of a concept of the embedded world."""


def reference_pictures(manifest: Manifest, folder: str = "") -> dict[str, list[Image.Image]]:
    """Reference pictures by LoRA id.

    They are ``FOLDER/<id>/*.png`` (or jpg, webp). Concepts of the embedded world are rendered.

    Args:
        manifest: the testbed.
        folder: where they are; the testbed's ``references`` if empty.

    Raises:
        CmloraError: if there is no such folder, or a LoRA has no picture in it.
    """
    place = folder or manifest.references
    if not place and manifest.model == EMBEDDED:
        return {lora.id: _rendered(lora.id) for lora in manifest.loras}
    if not place:
        raise CmloraError(
            "similarity needs reference pictures: FOLDER/<LoRA id>/*.png, named as references in "
            "the testbed or with --set SCORER.references=FOLDER"
        )
    root = Path(place).expanduser()
    if not root.is_dir():
        raise CmloraError(f"the folder of reference pictures {root} does not exist")
    found = {}
    for lora in manifest.loras:
        files = sorted(p for p in (root / lora.id).glob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise CmloraError(f"{root / lora.id} has no reference picture of LoRA {lora.id!r}")
        found[lora.id] = [_opened(file) for file in files]
    return found


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except OSError as error:
        raise CmloraError(f"cannot read the reference picture {path}: {error}") from None


def _rendered(concept: str) -> list[Image.Image]:
    from cmlora.emoji.scenes import render, scene_of

    scene = scene_of((concept,))
    rngs = [np.random.default_rng((13, index)) for index in range(RENDERS)]
    return [Image.fromarray(render(scene, rng)) for rng in rngs]
