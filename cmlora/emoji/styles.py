"""The drawn styles: pure filters over a finished picture, (64, 64, 3) uint8 in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

Array = np.ndarray[Any, np.dtype[Any]]
Rng = np.random.Generator
LUMA = np.array((0.299, 0.587, 0.114), np.float32)


def _grey(picture: Array) -> Array:
    """Brightness in 0..1, (H, W)."""
    grey: Array = picture.astype(np.float32) @ LUMA / 255
    return grey


def _edges(picture: Array) -> Array:
    """Strength of the colour edges, about 0..1, (H, W): the largest Sobel norm of a channel."""
    p = np.pad(picture.astype(np.float32) / 255, ((1, 1), (1, 1), (0, 0)), mode="edge")
    smooth_y = p[:-2] + 2 * p[1:-1] + p[2:]
    smooth_x = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    dx = smooth_y[:, 2:] - smooth_y[:, :-2]
    dy = smooth_x[2:] - smooth_x[:-2]
    strength: Array = (np.sqrt(dx**2 + dy**2).max(-1) / 2).clip(0, 1)
    return strength


def _blend(low: tuple[int, int, int], high: tuple[int, int, int], amount: Array) -> Array:
    mixed = np.array(low) + (np.array(high) - np.array(low)) * amount[..., None]
    drawn: Array = mixed.clip(0, 255).astype(np.uint8)
    return drawn


def sketch(picture: Array, rng: Rng) -> Array:
    """Pencil on white paper: brightness divided by its own blur."""
    del rng
    grey = _grey(picture)
    inverse = Image.fromarray(((1 - grey) * 255).astype(np.uint8))
    blurred = np.asarray(inverse.filter(ImageFilter.GaussianBlur(3)), np.float32) / 255
    pencil = (grey / (1.02 - blurred)).clip(0, 1) ** 1.6
    return _blend((45, 45, 52), (250, 250, 245), pencil)


def blueprint(picture: Array, rng: Rng) -> Array:
    """White contours on blue."""
    del rng
    return _blend((24, 62, 148), (240, 246, 255), _edges(picture))


def neon(picture: Array, rng: Rng) -> Array:
    """Contours that glow in the picture's own colours on black."""
    del rng
    colour = picture.astype(np.float32) / 255
    vivid = (colour - colour.min(-1, keepdims=True) + 0.12) / (
        colour.max(-1, keepdims=True) - colour.min(-1, keepdims=True) + 0.12
    )
    lit = _edges(picture)[..., None] * vivid * 1.2 + 0.02
    drawn: Array = (lit * 255).clip(0, 255).astype(np.uint8)
    return drawn


def sepia(picture: Array, rng: Rng) -> Array:
    """An old brown photograph."""
    del rng
    return _blend((52, 30, 14), (255, 236, 200), _grey(picture))


def noir(picture: Array, rng: Rng) -> Array:
    """Hard black and white."""
    del rng
    grey = _grey(picture)
    return _blend((0, 0, 0), (255, 255, 255), grey * grey * (3 - 2 * grey))


def chalk(picture: Array, rng: Rng) -> Array:
    """Cream chalk contours with dust on a green board."""
    dust = rng.uniform(0.75, 1.0, picture.shape[:2])
    return _blend((28, 70, 52), (250, 240, 205), _edges(picture) * dust)


def sunset_tint(picture: Array, rng: Rng) -> Array:
    """Two colours: violet shadows, orange lights."""
    del rng
    return _blend((60, 10, 110), (255, 190, 90), _grey(picture))


STYLE_FILTERS: dict[str, Callable[[Array, Rng], Array]] = {
    "sketch": sketch,
    "blueprint": blueprint,
    "neon": neon,
    "sepia": sepia,
    "noir": noir,
    "chalk": chalk,
    "sunset tint": sunset_tint,
}
"""By the element's name."""
