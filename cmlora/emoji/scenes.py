"""Scenes: which elements, where, and how they are drawn. 64x64 RGB pictures, seeded.

A scene is a background, a character, headwear on the character, an object beside it, and a style
over everything; each may be absent. `sample` draws a scene at random, `render` draws its picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from cmlora.emoji.backgrounds import BACKGROUND_PAINTERS, plain
from cmlora.emoji.styles import STYLE_FILTERS
from cmlora.emoji.world import (
    BY_CONCEPT,
    CATEGORIES,
    ELEMENTS,
    KNOWN,
    SIZE,
    Category,
    Element,
)

SPRITES = Path(__file__).parent / "sprites"
SCENERY = {"palm": 0x1F334, "cactus": 0x1F335, "pine": 0x1F332, "oak": 0x1F333, "moon": 0x1F319}
"""Sprites that belong to backgrounds, with their code points."""

ABSENT: Mapping[Category, float] = {
    "character": 0.06,
    "clothing": 0.3,
    "style": 0.65,
    "background": 0.1,
    "object": 0.2,
}
"""How often a category is left out of a random scene."""

SOFTNESS = 0.5
"""Radius in pixels of a last blur, as of a lens; the autoencoder cannot keep sharper edges."""

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Scene:
    """The elements of a picture, one per category or ``None``."""

    character: Element | None = None
    clothing: Element | None = None
    style: Element | None = None
    background: Element | None = None
    object: Element | None = None

    def elements(self) -> list[Element]:
        """What is in the picture, in the order of `CATEGORIES`."""
        return [e for c in CATEGORIES if (e := getattr(self, c)) is not None]


def sprite_file(name: str) -> Path:
    """Where the sprite of an element is kept."""
    return SPRITES / f"{name.replace(' ', '_')}.png"


@cache
def load_sprite(name: str) -> Image.Image:
    """The sprite of an element, RGBA, its longer side 64 pixels."""
    with Image.open(sprite_file(name)) as image:
        return image.convert("RGBA")


def sample(
    rng: np.random.Generator,
    *,
    choices: Mapping[Category, tuple[Element, ...]] = KNOWN,
    fixed: Mapping[Category, Element | None] | None = None,
    absent: Mapping[Category, float] = ABSENT,
) -> Scene:
    """A random scene.

    Args:
        rng: source of randomness.
        choices: the elements to choose from; the default leaves the held-out concepts out.
        fixed: categories that are not drawn at random, with their element or ``None``.
        absent: probability per category that nothing is drawn.

    Returns:
        A scene that always shows a character or an object, and headwear on characters only.
    """
    picked: dict[Category, Element | None] = {}
    for category in CATEGORIES:
        options = choices[category]
        missing = rng.random() < absent[category] or not options
        picked[category] = None if missing else options[int(rng.integers(len(options)))]
    picked.update(fixed or {})
    may_draw = {c: c not in (fixed or {}) and len(choices[c]) > 0 for c in CATEGORIES}
    if picked["character"] is None and picked["clothing"] is not None:
        if may_draw["clothing"]:
            picked["clothing"] = None
        elif may_draw["character"]:
            options = choices["character"]
            picked["character"] = options[int(rng.integers(len(options)))]
    if picked["character"] is None and picked["object"] is None:
        category = "object" if may_draw["object"] else "character"
        if may_draw[category]:
            options = choices[category]
            picked[category] = options[int(rng.integers(len(options)))]
    return Scene(**picked)


def scene_of(concepts: tuple[str, ...]) -> Scene:
    """The scene with exactly these concepts ("character_1", ...) and nothing else."""
    return Scene(**{BY_CONCEPT[c].category: BY_CONCEPT[c] for c in concepts})


def _paste(picture: Image.Image, name: str, side: float, centre: tuple[float, float]) -> None:
    sprite = load_sprite(name)
    scale = side / max(sprite.size)
    size = (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale)))
    small = sprite.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
    corner = (round(centre[0] - size[0] / 2), round(centre[1] - size[1] / 2))
    picture.paste(small, corner, small)


def render(scene: Scene, rng: np.random.Generator) -> Array:
    """Draw a scene with random jitter of positions, sizes and background details.

    Args:
        scene: the elements.
        rng: source of the jitter; equal states give equal pictures.

    Returns:
        The picture, (64, 64, 3) uint8.
    """
    if scene.background is None:
        ground = plain(rng)
    else:
        ground = BACKGROUND_PAINTERS[scene.background.name](rng, load_sprite)
    picture = ground.resize((SIZE, SIZE), Image.Resampling.BOX)
    alone = scene.character is None
    if scene.character is not None:
        side = rng.uniform(31, 36)
        x = rng.uniform(21, 26) if scene.object else rng.uniform(27, 37)
        y = rng.uniform(39, 43)
        _paste(picture, scene.character.name, side, (x, y))
        if scene.clothing is not None:
            box = load_sprite(scene.character.name)
            width, height = (side * n / max(box.size) for n in box.size)
            top = (
                x + (scene.character.head[0] - 0.5) * width,
                y + (scene.character.head[1] - 0.5) * height,
            )
            hat = load_sprite(scene.clothing.name)
            hat_side = rng.uniform(20, 23)
            hat_height = hat_side * hat.height / max(hat.size)
            _paste(picture, scene.clothing.name, hat_side, (top[0], top[1] - 0.22 * hat_height))
    if scene.object is not None:
        side = rng.uniform(28, 33) if alone else rng.uniform(20.5, 24)
        x = rng.uniform(25, 39) if alone else rng.uniform(47, 51)
        y = rng.uniform(38, 44) if alone else rng.uniform(44, 50)
        _paste(picture, scene.object.name, side, (x, y))
    pixels = np.asarray(picture)
    if scene.style is not None:
        pixels = STYLE_FILTERS[scene.style.name](pixels, rng)
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(SOFTNESS)))


def pictures(
    count: int, seed: int, *, choices: Mapping[Category, tuple[Element, ...]] = ELEMENTS
) -> tuple[list[Scene], Array]:
    """Random scenes with their pictures.

    Args:
        count: how many.
        seed: scene i depends on (seed, i) alone.
        choices: the elements to choose from; by default all, held-out ones included.

    Returns:
        The scenes and their pictures, (count, 64, 64, 3) uint8.
    """
    scenes = []
    out = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        scenes.append(sample(rng, choices=choices))
        out[index] = render(scenes[-1], rng)
    return scenes, out
