"""Plain facts about pixels: a method that scores well on washed-out pictures gives itself away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from cmlora.eval.manifest import Manifest
from cmlora.eval.scorers.scorer import Item, Marks


class Sanity:
    """Sharpness, saturation, contrast and clipping.

    Args:
        manifest: not used.
        device: not used.
    """

    version = "1"

    def __init__(self, manifest: Manifest | None = None, device: str | None = None) -> None:
        del manifest, device

    def __call__(self, items: Sequence[Item]) -> list[Marks]:
        """The four values of every picture; none of them is better the larger it is."""
        return [Marks(facts(item.image())) for item in items]


def facts(picture: Image.Image) -> dict[str, float]:
    """Four numbers about a picture.

    Args:
        picture: of any size.

    Returns:
        ``sharpness``: standard deviation of the Laplacian of the grey values (0 to 1);
        ``saturation``: mean of (max - min) / max over the channels; ``contrast``: standard
        deviation of the grey values; ``clipped``: share of channel values at either end.
    """
    rgb = np.asarray(picture.convert("RGB"), dtype=np.float64) / 255  # (H, W, 3)
    grey = rgb @ np.array([0.299, 0.587, 0.114])
    laplacian = (
        grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    )
    brightest = rgb.max(2)
    spread = brightest - rgb.min(2)
    shares = np.divide(spread, brightest, out=np.zeros_like(spread), where=brightest > 0)
    return {
        "sharpness": float(laplacian.std()),
        "saturation": float(shares.mean()),
        "contrast": float(grey.std()),
        "clipped": float(((rgb == 0) | (rgb == 1)).mean()),
    }
