"""What the page shows of a LoRA file, from its header alone: no tensor is read."""

import base64
import binascii
import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from html import escape
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from cmlora import container, keys
from cmlora.emoji.paths import WEIGHTS
from cmlora.errors import CmloraError
from cmlora.files import triggers
from cmlora.frequency.card import card_path
from cmlora.ui.previews import data_uri
from cmlora.ui.studio import Studio, without_path

THUMBNAIL = 96
"""Longest side of a thumbnail in pixels."""

_PICTURES = (".preview.png", ".png", ".preview.jpg", ".jpg", ".jpeg", ".webp")
_PICTURE_BYTES = 8 * 2**20
_PICTURE_PIXELS = 40_000_000
_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}


@dataclass(frozen=True)
class Card:
    """A LoRA as the page shows it.

    Args:
        name: in the list.
        family: of base models, in short; empty if the file does not say.
        rank: of its updates, such as ``8`` or ``4-16``; empty if unknown.
        triggers: its trigger words.
        bytes: of the file.
        thumbnail: a ``data:`` address.
        profiled: whether a frequency profile lies beside it.
        problem: why it cannot be used; empty if it can.
    """

    name: str
    family: str = ""
    rank: str = ""
    triggers: tuple[str, ...] = ()
    bytes: int = 0
    thumbnail: str = ""
    profiled: bool = False
    problem: str = ""

    @property
    def short(self) -> str:
        """The last part of the name."""
        return self.name.rsplit("/", 1)[-1]


def cards(studio: Studio, model: str) -> list[Card]:
    """Every LoRA there is for a model; a broken file has a card that says what is wrong."""
    return [card(name, path) for name, path in studio.lora_paths(model).items()]


def card(name: str, path: Path) -> Card:
    """The card of one file; never raises for what is in the file."""
    try:
        found = path.stat()
    except OSError as failure:
        return Card(name, thumbnail=monogram(name), problem=failure.strerror or "cannot be read")
    return _card(name, path, found.st_mtime_ns, found.st_size, card_path(path).exists())


@lru_cache(4096)
def _card(name: str, path: Path, changed: int, size: int, profiled: bool) -> Card:
    try:
        head = container.header(path)
        layout = keys.layout(head.shapes)
        if not layout.modules and not layout.forms:
            raise CmloraError(f"{path.name} holds no LoRA")
        words = triggers(path)
    except CmloraError as error:
        problem = without_path(str(error), path)
        return Card(name, bytes=size, thumbnail=monogram(name), problem=problem)
    ranks = sorted({head.shapes[m["down"]][0] for m in layout.modules.values() if "down" in m})
    rank = "" if not ranks else str(ranks[0])
    if len(ranks) > 1:
        rank = f"{ranks[0]}-{ranks[-1]}"
    return Card(
        name,
        family="emoji" if _embedded_one(path) else _family(head, layout),
        rank=rank,
        triggers=words,
        bytes=size,
        thumbnail=_beside(path) or _embedded(head.metadata) or _scene(path) or monogram(name),
        profiled=profiled,
    )


def first_triggers(found: list[Card]) -> dict[str, str]:
    """The first trigger of every LoRA that has one, by name."""
    return {card.name: card.triggers[0] for card in found if card.triggers}


def monogram(name: str) -> str:
    """A thumbnail for a LoRA that brings none: its first letters on a colour of its own.

    >>> monogram("styles/ink_wash")[:26]
    'data:image/svg+xml;base64,'
    """
    short = name.rsplit("/", 1)[-1]
    parts = [part for part in short.replace("-", "_").split("_") if part]
    letters = "".join(part[0] for part in parts[:2]) if len(parts) > 1 else short[:2]
    hue = zlib.crc32(name.encode()) % 360
    drawing = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 48 48">'
        f'<rect width="48" height="48" fill="hsl({hue} 42% 46%)"/>'
        '<text x="24" y="31" text-anchor="middle" font-family="system-ui, sans-serif" '
        f'font-size="19" font-weight="600" fill="#fff">{escape(letters.upper())}</text></svg>'
    )
    return f"data:image/svg+xml;base64,{base64.b64encode(drawing.encode()).decode()}"


def _family(head: container.Header, layout: keys.Layout) -> str:
    for module, roles in layout.modules.items():
        if module.startswith("unet.") and module.endswith(("attn2.to_k", "attn2.to_v")):
            width = head.shapes[roles["down"]][1]
            return _WIDTHS.get(width, f"UNet, text {width}")
    if any(module.startswith("transformer.") for module in layout.modules):
        return "transformer"
    return ""


def _beside(path: Path) -> str:
    """The picture of the same name in the same folder."""
    for suffix in _PICTURES:
        picture = path.with_suffix(suffix)
        if picture.is_file() and not picture.is_symlink():
            if picture.stat().st_size <= _PICTURE_BYTES:
                return _small(picture.read_bytes())
            return ""
    return ""


def _embedded(metadata: Mapping[str, str]) -> str:
    """The picture in the header, as modelspec stores it."""
    _, sign, text = metadata.get("modelspec.thumbnail", "").partition(";base64,")
    if not sign or len(text) > _PICTURE_BYTES:
        return ""
    try:
        return _small(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return ""


def _embedded_one(path: Path) -> bool:
    """Whether a file is one of the LoRAs that come with the package."""
    return path.is_relative_to(WEIGHTS)


def _scene(path: Path) -> str:
    """What an embedded LoRA was trained to draw."""
    if not _embedded_one(path):
        return ""
    import numpy as np

    from cmlora.emoji.scenes import render, scene_of
    from cmlora.emoji.world import BY_CONCEPT, KNOWN

    if path.stem not in BY_CONCEPT:
        return ""
    scene = scene_of((path.stem,))
    if BY_CONCEPT[path.stem].category in ("clothing", "style"):  # on something that has it
        scene = replace(scene, character=KNOWN["character"][0])
    return data_uri(Image.fromarray(render(scene, np.random.default_rng(0))))


def _small(data: bytes) -> str:
    """The picture anew and small: nothing of a stranger's file reaches the page as it is."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            if picture.width * picture.height > _PICTURE_PIXELS:
                return ""
            picture.draft("RGB", (THUMBNAIL, THUMBNAIL))
            return data_uri(picture.convert("RGB"), THUMBNAIL)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
