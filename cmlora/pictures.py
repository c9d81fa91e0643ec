"""Pictures with their recipe inside: PNG, WebP and JPEG, written whole and read with distrust."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmlora import imagetext
from cmlora.atomic import replacing
from cmlora.errors import CmloraError
from cmlora.infotext import Infotext, parse
from cmlora.recipe import Recipe, from_png, infotext, png_info

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
"""What pictures may be called."""


def check_name(path: str | PathLike[str], what: str = "") -> None:
    """Raises `CmloraError` unless a picture of this name would keep its recipe."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise CmloraError(
            f"{what}{path}: pictures are written as .png, .webp or .jpg, which keep the recipe"
        )


def save(image: Image, path: str | PathLike[str], recipe: Recipe) -> None:
    """Writes a picture with its recipe, and with the text that web UIs read.

    The name decides the format. PNG and WebP keep every pixel as it is; JPEG does not.

    Raises:
        CmloraError: if the name is none of a picture, the recipe does not fit into a JPEG, or the
            place cannot be written to.
    """
    check_name(path)
    suffix = Path(path).suffix.lower()
    options: dict[str, Any] = {}
    if suffix == ".png":
        options = {"format": "PNG", "pnginfo": png_info(recipe)}
    else:
        block = imagetext.exif(recipe.to_json(), infotext(recipe))
        if suffix == ".webp":
            options = {"format": "WEBP", "lossless": True, "quality": 100, "exif": block}
        else:
            if not imagetext.fits_jpeg(block):
                raise CmloraError(
                    f"{path}: a recipe of {len(block)} bytes does not fit into a JPEG; "
                    "write .png or .webp"
                )
            exif = b"Exif\0\0" + block
            options = {"format": "JPEG", "quality": 95, "subsampling": 0, "exif": exif}
            image = image.convert("RGB")
    with replacing(path) as file:
        image.save(file, **options)


def read(path: str | PathLike[str]) -> Recipe:
    """The recipe in a picture; time and memory are bounded whatever the file is.

    Raises:
        CmloraError: if there is no such file, it is no picture, or it holds no valid recipe.
    """
    return from_png(path)


def read_infotext(path: str | PathLike[str]) -> Infotext | None:
    """What another program wrote about a picture, if it did; see `read` for what is raised."""
    text = imagetext.texts(path).get("parameters", "")
    return parse(text) if text.strip() else None
