"""The drawn backgrounds, at twice the picture's size so that reducing them smooths the edges."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128
Rng = np.random.Generator
Sprites = Callable[[str], Image.Image]
Colour = tuple[int, int, int]


def _sky(top: Colour, bottom: Colour) -> Image.Image:
    ramp = np.linspace(0.0, 1.0, SIDE)[:, None, None]
    rows = np.array(top) * (1 - ramp) + np.array(bottom) * ramp
    return Image.fromarray(np.broadcast_to(rows, (SIDE, SIDE, 3)).astype(np.uint8))


def _hill(draw: ImageDraw.ImageDraw, rng: Rng, level: float, height: float, fill: Colour) -> None:
    phase, waves = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.3)
    xs = np.linspace(0, SIDE, 17)
    ys = level + height * np.sin(2 * np.pi * waves * xs / SIDE + phase)
    line = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
    draw.polygon([(0, SIDE), *line, (SIDE, SIDE)], fill=fill)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Colour) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def _stamp(ground: Image.Image, sprite: Image.Image, side: float, x: float, y: float) -> None:
    scale = side / max(sprite.size)
    small = sprite.resize((round(sprite.width * scale), round(sprite.height * scale)))
    ground.paste(small, (round(x - small.width / 2), round(y - small.height)), small)


def plain(rng: Rng) -> Image.Image:
    """No background: one pale colour."""
    colour = tuple(int(v) for v in rng.integers(190, 250, 3))
    return Image.new("RGB", (SIDE, SIDE), colour)


def beach(rng: Rng, sprites: Sprites) -> Image.Image:
    """Sky, sun, sea with waves, sand, a palm."""
    ground = _sky((90, 180, 245), (190, 230, 250))
    draw = ImageDraw.Draw(ground)
    _disc(draw, rng.uniform(60, 110), rng.uniform(14, 26), 11, (255, 225, 80))
    sea, sand = rng.uniform(44, 54), rng.uniform(78, 86)
    draw.rectangle((0, sea, SIDE, SIDE), fill=(30, 120, 200))
    for y in np.arange(sea + 6, sand - 2, 8):
        x = rng.uniform(-20, 20)
        for start in np.arange(x, SIDE, 34):
            draw.line((start, y, start + 16, y), fill=(150, 210, 240), width=2)
    draw.rectangle((0, sand, SIDE, SIDE), fill=(240, 215, 150))
    draw.line((0, sand, SIDE, sand), fill=(255, 255, 255), width=3)
    _stamp(ground, sprites("palm"), rng.uniform(60, 70), rng.uniform(8, 26), sand + 12)
    return ground


def desert(rng: Rng, sprites: Sprites) -> Image.Image:
    """A pale hot sky, two dunes, cacti."""
    ground = _sky((250, 200, 120), (255, 235, 190))
    draw = ImageDraw.Draw(ground)
    _disc(draw, rng.uniform(20, 108), rng.uniform(16, 28), 13, (255, 250, 220))
    _hill(draw, rng, rng.uniform(62, 70), 9, (225, 165, 85))
    _hill(draw, rng, rng.uniform(88, 96), 7, (205, 135, 60))
    _stamp(ground, sprites("cactus"), rng.uniform(38, 46), rng.uniform(8, 24), 84)
    _stamp(ground, sprites("cactus"), rng.uniform(26, 34), rng.uniform(100, 120), 78)
    return ground


def snow(rng: Rng, sprites: Sprites) -> Image.Image:
    """White ground, peaked mountains, snowflakes."""
    del sprites
    ground = _sky((150, 190, 225), (215, 230, 245))
    draw = ImageDraw.Draw(ground)
    for centre in (rng.uniform(10, 40), rng.uniform(85, 118), rng.uniform(50, 75)):
        peak, foot = rng.uniform(20, 36), 82.0
        half = (foot - peak) * 0.75
        draw.polygon(
            [(centre - half, foot), (centre, peak), (centre + half, foot)], (110, 130, 160)
        )
        cap = (foot - peak) * 0.35
        draw.polygon(
            [(centre - cap * 0.75, peak + cap), (centre, peak), (centre + cap * 0.75, peak + cap)],
            (250, 252, 255),
        )
    _hill(draw, rng, rng.uniform(80, 86), 4, (240, 246, 252))
    for x, y in rng.uniform(0, SIDE, (26, 2)):
        _disc(draw, x, y, 2.2, (255, 255, 255))
    return ground


def meadow(rng: Rng, sprites: Sprites) -> Image.Image:
    """Blue sky with round clouds, rolling green, flowers."""
    del sprites
    ground = _sky((110, 190, 250), (200, 232, 252))
    draw = ImageDraw.Draw(ground)
    for x in (rng.uniform(8, 40), rng.uniform(76, 120)):
        y = rng.uniform(14, 32)
        for dx, r in ((-11, 7), (0, 10), (11, 7)):
            _disc(draw, x + dx, y, r, (255, 255, 255))
    _hill(draw, rng, rng.uniform(64, 72), 8, (135, 200, 90))
    _hill(draw, rng, rng.uniform(88, 96), 5, (95, 170, 60))
    for x, y in zip(rng.uniform(0, SIDE, 16), rng.uniform(98, SIDE, 16), strict=True):
        colour = ((255, 240, 90), (250, 120, 160), (255, 255, 255))[int(rng.integers(3))]
        _disc(draw, x, y, 2.6, colour)
    return ground


def _trees(rng: Rng, tree: Image.Image, ground: Image.Image, floor: float, side: float) -> None:
    for row, (count, scale) in enumerate(((5, 0.8), (4, 1.05))):
        xs = np.linspace(4, SIDE - 4, count) + rng.uniform(-7, 7, count)
        for x in xs:
            _stamp(ground, tree, side * scale * rng.uniform(0.9, 1.1), x, floor + 10 * row)


def pine_forest(rng: Rng, sprites: Sprites) -> Image.Image:
    """Two rows of pines on dark ground in mist."""
    ground = _sky((175, 200, 205), (205, 220, 215))
    floor = rng.uniform(74, 80)
    ImageDraw.Draw(ground).rectangle((0, floor - 4, SIDE, SIDE), fill=(60, 95, 60))
    _trees(rng, sprites("pine"), ground, floor, 56)
    return ground


def oak_forest(rng: Rng, sprites: Sprites) -> Image.Image:
    """Two rows of round trees on bright ground."""
    ground = _sky((165, 220, 250), (225, 242, 235))
    floor = rng.uniform(74, 80)
    ImageDraw.Draw(ground).rectangle((0, floor - 4, SIDE, SIDE), fill=(165, 205, 95))
    _trees(rng, sprites("oak"), ground, floor, 50)
    return ground


def starry_night(rng: Rng, sprites: Sprites) -> Image.Image:
    """Dark blue sky with stars and a moon over a hill."""
    ground = _sky((8, 12, 48), (36, 44, 100))
    draw = ImageDraw.Draw(ground)
    for x, y in zip(rng.uniform(0, SIDE, 26), rng.uniform(0, 92, 26), strict=True):
        r = rng.uniform(1.2, 2.4)
        _disc(draw, x, y, r, (255, 250, 210))
    _stamp(ground, sprites("moon"), 26, rng.uniform(94, 112), rng.uniform(34, 42))
    _hill(draw, rng, rng.uniform(100, 106), 5, (18, 26, 40))
    return ground


def city_night(rng: Rng, sprites: Sprites) -> Image.Image:
    """Dark towers with lit windows before a violet sky."""
    del sprites
    ground = _sky((40, 22, 70), (110, 60, 120))
    draw = ImageDraw.Draw(ground)
    x = rng.uniform(-14, 0)
    while x < SIDE:
        width, top = rng.uniform(20, 30), rng.uniform(20, 58)
        shade = int(rng.integers(18, 42))
        draw.rectangle((x, top, x + width, 112), fill=(shade, shade, shade + 18))
        for wy in np.arange(top + 5, 104, 9):
            for wx in np.arange(x + 4, x + width - 4, 8):
                if rng.random() < 0.7:
                    draw.rectangle((wx, wy, wx + 3, wy + 4), fill=(255, 215, 100))
        x += width + 2
    draw.rectangle((0, 110, SIDE, SIDE), fill=(52, 52, 62))
    return ground


def bamboo_grove(rng: Rng, sprites: Sprites) -> Image.Image:
    """Upright jointed stalks from edge to edge, with leaves."""
    del sprites
    ground = _sky((205, 230, 170), (170, 205, 130))
    draw = ImageDraw.Draw(ground)
    for x in np.arange(rng.uniform(2, 12), SIDE, 15.5):
        x += rng.uniform(-2.5, 2.5)
        tint = int(rng.integers(-18, 18))
        draw.rectangle((x - 3.5, 0, x + 3.5, SIDE), fill=(80 + tint, 150 + tint, 60))
        for y in np.arange(rng.uniform(4, 20), SIDE, 21):
            draw.rectangle((x - 4.5, y, x + 4.5, y + 2), fill=(45, 95, 35))
        for y in rng.uniform(4, 90, 2):
            draw.polygon([(x, y), (x + 13, y - 6), (x + 7, y + 3)], fill=(50, 120, 40))
    return ground


def aurora(rng: Rng, sprites: Sprites) -> Image.Image:
    """Green and violet curtains of light over black peaks."""
    del sprites
    xs = np.arange(SIDE)
    ys = np.arange(SIDE)[:, None]
    sky = np.zeros((SIDE, SIDE, 3)) + np.array((10, 20, 45))
    for colour, level in (
        ((60, 240, 150), rng.uniform(24, 36)),
        ((190, 80, 230), rng.uniform(8, 18)),
    ):
        wave = level + 12 * np.sin(
            2 * np.pi * xs / SIDE * rng.uniform(0.8, 1.6) + rng.uniform(0, 6.3)
        )
        below = ys - wave[None]
        glow = np.where(below > 0, np.exp(-below / 26), np.exp(below / 4))
        folds = 0.7 + 0.3 * np.sin(xs * rng.uniform(0.35, 0.5) + rng.uniform(0, 6.3))
        sky += glow[..., None] * folds[None, :, None] * np.array(colour)
    ground = Image.fromarray(sky.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(ground)
    for centre in (rng.uniform(0, 34), rng.uniform(90, 128), rng.uniform(45, 80)):
        peak = rng.uniform(72, 88)
        draw.polygon([(centre - 46, 120), (centre, peak), (centre + 46, 120)], (8, 10, 18))
    draw.rectangle((0, 112, SIDE, SIDE), fill=(14, 18, 30))
    return ground


BACKGROUND_PAINTERS: dict[str, Callable[[Rng, Sprites], Image.Image]] = {
    "beach": beach,
    "desert": desert,
    "snow": snow,
    "meadow": meadow,
    "pine forest": pine_forest,
    "oak forest": oak_forest,
    "starry night": starry_night,
    "city night": city_night,
    "bamboo grove": bamboo_grove,
    "aurora": aurora,
}
"""By the element's name: (rng, sprite lookup) to a 128x128 picture."""
