"""Cut the sprites out of the Noto Color Emoji font: `python -m cmlora.emoji.extract [FONT]`.

The sprites are shipped, so this is only needed to change the set. The font is Debian's
fonts-noto-color-emoji (licence in sprites/LICENSE).
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cmlora.emoji.scenes import SCENERY, SPRITES, sprite_file
from cmlora.emoji.world import ELEMENTS

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
STRIKE = 109
"""The only size, in pixels per em, at which the font has bitmaps."""


def sprite(font: ImageFont.FreeTypeFont, codepoint: int, side: int = 64) -> Image.Image:
    """One emoji, cropped to its ink and scaled so that its longer side is `side` pixels."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((8, 8), chr(codepoint), font=font, embedded_color=True)
    ink = canvas.crop(canvas.getbbox())
    scale = side / max(ink.size)
    size = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
    return ink.resize(size, Image.Resampling.LANCZOS)


def main(path: str = FONT) -> None:
    """Write every sprite of the world as a PNG file."""
    if not Path(path).is_file():
        raise SystemExit(f"{path}: no such font; install Debian's fonts-noto-color-emoji")
    font = ImageFont.truetype(path, STRIKE)
    drawn = [(e.name, e.codepoint) for group in ELEMENTS.values() for e in group if e.codepoint]
    SPRITES.mkdir(exist_ok=True)
    for name, codepoint in [*drawn, *SCENERY.items()]:
        sprite(font, codepoint).save(sprite_file(name), optimize=True)
    print(f"{len(drawn) + len(SCENERY)} sprites in {SPRITES}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
