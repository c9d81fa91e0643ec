"""The pictures that the embedded models are trained on, rendered once and kept on disk."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.progress import track

from cmlora.emoji.paths import work_folder
from cmlora.emoji.scenes import Scene, render, sample
from cmlora.emoji.world import CATEGORIES, ELEMENTS, KNOWN, SIZE, Category, Element

Array = np.ndarray[Any, np.dtype[Any]]
CHUNK = 1000


@dataclass(frozen=True)
class Dataset:
    """Scenes with pictures.

    Args:
        labels: (n, 5) int16, per category 0 for nothing, else 1 + position in `ELEMENTS`.
        pictures: (n, 64, 64, 3) uint8, memory-mapped.
    """

    labels: Array
    pictures: Array

    def scene(self, index: int) -> Scene:
        """The elements of one picture."""
        return scene_of_labels(self.labels[index])


def labels_of(scene: Scene) -> list[int]:
    """Per category 0 for nothing, else 1 + the element's position in `ELEMENTS`."""
    return [0 if (e := getattr(scene, c)) is None else 1 + ELEMENTS[c].index(e) for c in CATEGORIES]


def scene_of_labels(labels: Array) -> Scene:
    """The inverse of `labels_of`."""
    chosen = {
        c: ELEMENTS[c][int(label) - 1] if label else None
        for c, label in zip(CATEGORIES, labels, strict=True)
    }
    return Scene(**chosen)


def _chunk(
    start: int, seed: int, choices: Mapping[Category, tuple[Element, ...]]
) -> tuple[Array, Array]:
    labels = np.empty((CHUNK, len(CATEGORIES)), np.int16)
    pictures = np.empty((CHUNK, SIZE, SIZE, 3), np.uint8)
    for i in range(CHUNK):
        rng = np.random.default_rng((seed, start + i))
        scene = sample(rng, choices=choices)
        labels[i] = labels_of(scene)
        pictures[i] = render(scene, rng)
    return labels, pictures


def dataset(name: str, count: int, seed: int, *, held_out: bool) -> Dataset:
    """Render a data set, or open it if it was rendered before.

    Args:
        name: file name in the work folder.
        count: pictures, a multiple of 1000.
        seed: scene i depends on (seed, i) alone.
        held_out: include the eleven held-out concepts.

    Returns:
        The data set, its pictures memory-mapped.
    """
    folder = work_folder()
    pixel_file, label_file = folder / f"{name}.pixels.npy", folder / f"{name}.labels.npy"
    if not label_file.exists():
        choices = ELEMENTS if held_out else KNOWN
        pictures = np.lib.format.open_memmap(pixel_file, "w+", np.uint8, (count, SIZE, SIZE, 3))
        labels = np.empty((count, len(CATEGORIES)), np.int16)
        starts = range(0, count, CHUNK)
        with ProcessPoolExecutor() as pool:
            results = pool.map(partial(_chunk, seed=seed, choices=choices), starts)
            for start, (some, drawn) in track(
                zip(starts, results, strict=True), f"rendering {name}", total=len(starts)
            ):
                labels[start : start + CHUNK] = some
                pictures[start : start + CHUNK] = drawn
        pictures.flush()
        np.save(label_file, labels)
    return Dataset(np.load(label_file), np.load(pixel_file, mmap_mode="r"))
