"""The pictures of a training and their captions, from a folder or from memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from cmlora.errors import CmloraError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Caption = str | Callable[[np.random.Generator], str]


@dataclass(frozen=True, eq=False)
class Example:
    """One picture of a training.

    Args:
        picture: a file, a PIL picture, or latents (C, H, W), scaled as the denoiser wants them.
        caption: a text, or a function that draws one from a random generator at every use.
    """

    picture: Path | Image.Image | Tensor
    caption: Caption

    def text(self, random: np.random.Generator) -> str:
        """The caption of one use."""
        return self.caption if isinstance(self.caption, str) else self.caption(random)

    def open(self) -> Image.Image:
        """The picture in RGB, upright, on white where it was transparent.

        Raises:
            CmloraError: if it cannot be read.
        """
        assert not isinstance(self.picture, Tensor)
        try:
            found: Any = self.picture
            if isinstance(found, Path):
                with Image.open(found) as file:
                    found = ImageOps.exif_transpose(file)
                    found.load()
            if found.mode in ("RGBA", "LA", "P", "PA"):
                found = found.convert("RGBA")
                white = Image.new("RGBA", found.size, "white")
                found = Image.alpha_composite(white, found)
            return found.convert("RGB")  # type: ignore[no-any-return]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise CmloraError(f"{self.picture} cannot be read as a picture: {error}") from None

    def digest(self) -> str:
        """Changes with the picture, and with the caption if it is a text."""
        found = hashlib.sha256()
        if isinstance(self.picture, Path):
            found.update(self.picture.read_bytes())
        elif isinstance(self.picture, Tensor):
            found.update(self.picture.detach().cpu().float().contiguous().numpy().tobytes())
        else:
            found.update(repr(self.picture.size).encode() + self.picture.tobytes())
        if isinstance(self.caption, str):
            found.update(self.caption.encode())
        return found.hexdigest()


def read_folder(folder: str | Path, trigger: str = "") -> list[Example]:
    """The pictures of a folder with their captions, by name.

    A caption is the ``text`` of a picture's row in ``metadata.jsonl``, else the content of the
    ``.txt`` file of its name, else the trigger; a caption without the trigger gets it in front.

    Args:
        folder: with pictures in PNG, JPEG, WebP or BMP.
        trigger: word that calls the concept.

    Raises:
        CmloraError: if there is no picture, one cannot be read, one has no caption, or a caption
            has no picture.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CmloraError(f"there is no folder {folder} with pictures to train on")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not files:
        raise CmloraError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    stems: dict[str, Path] = {}
    for file in files:
        if file.stem in stems:
            raise CmloraError(f"{file} and {stems[file.stem].name} would share a caption file")
        stems[file.stem] = file
    rows = _rows(folder / "metadata.jsonl")
    for name in rows:
        if not (folder / name).is_file():
            raise CmloraError(f"{folder / 'metadata.jsonl'}: there is no picture {name}")
    for text in sorted(folder.glob("*.txt")):
        if text.stem not in stems:
            raise CmloraError(f"{text} is a caption without a picture")
    examples = []
    for file in files:
        caption = rows.get(file.name)
        beside = file.with_suffix(".txt")
        if caption is None and beside.is_file():
            try:
                caption = " ".join(beside.read_text(encoding="utf-8").split())
            except UnicodeDecodeError:
                raise CmloraError(f"{beside} is no text in UTF-8") from None
        caption = caption or trigger
        if not caption:
            raise CmloraError(
                f"{file} has no caption; write one to {beside.name}, or give a trigger word"
            )
        if trigger and trigger not in caption:
            caption = f"{trigger}, {caption}"
        example = Example(file, caption)
        example.open()
        examples.append(example)
    return examples


def _rows(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise CmloraError(
                f"{path}, line {number}: expected an object with file_name and text"
            ) from None
        found[name] = " ".join(text.split())
    return found
