"""Sizes of pictures that are trained together, and which pictures make up a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

Size = tuple[int, int]
"""Width and height in pixels."""


def sizes(resolution: int, step: int, ratio: float = 2.0) -> list[Size]:
    """Sizes of about ``resolution`` squared pixels, none more.

    Args:
        resolution: side of the square one.
        step: sides are multiples of it; the resolution if that is smaller.
        ratio: of the sides, at most.

    >>> sizes(512, 64)
    [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    """
    step = min(step, resolution)
    found = set()
    width = step
    while width <= resolution * math.sqrt(ratio):
        height = resolution**2 // width // step * step
        if height >= step and max(width, height) <= ratio * min(width, height):
            found.add((width, height))
            found.add((height, width))
        width += step
    return sorted(found) or [(resolution, resolution)]


def nearest(size: Size, choices: Sequence[Size]) -> Size:
    """The choice whose shape is most like that of a picture; the largest of equals."""
    wanted = math.log(size[0] / size[1])
    return min(choices, key=lambda s: (abs(math.log(s[0] / s[1]) - wanted), -s[0] * s[1], s))


def fitted(picture: Image.Image, size: Size) -> Image.Image:
    """The picture scaled to cover a size, and what hangs over cut off on both sides."""
    scale = max(size[0] / picture.width, size[1] / picture.height)
    inner = (
        max(size[0], round(picture.width * scale)),
        max(size[1], round(picture.height * scale)),
    )
    scaled = picture.resize(inner, Image.Resampling.LANCZOS)
    left, top = (inner[0] - size[0]) // 2, (inner[1] - size[1]) // 2
    return scaled.crop((left, top, left + size[0], top + size[1]))


class Order:
    """Which pictures make up which batch: a function of the seed and the batch's number alone.

    Args:
        groups: numbers of the pictures of each size.
        batch: pictures per batch; the last of an epoch and size is filled up from its first.
        seed: of the order.
        random: draw with replacement instead of going through all pictures in turn.
    """

    def __init__(
        self, groups: Mapping[Size, Sequence[int]], batch: int, seed: int, random: bool = False
    ) -> None:
        self.groups = {size: list(rows) for size, rows in sorted(groups.items()) if rows}
        self.batch, self.seed, self.random = batch, seed, random
        self.per_epoch = sum(-(-len(rows) // batch) for rows in self.groups.values())
        self._known: tuple[int, list[tuple[Size, list[int]]]] | None = None

    def epoch(self, number: int) -> int:
        """Which epoch a batch belongs to."""
        return number // self.per_epoch

    def at(self, number: int) -> tuple[Size, list[int]]:
        """Size and pictures of a batch."""
        if self.random:
            rng = np.random.default_rng((self.seed, 1, number))
            counts = [len(rows) for rows in self.groups.values()]
            place = int(rng.integers(sum(counts)))
            which = int(np.searchsorted(np.cumsum(counts), place, side="right"))
            size = list(self.groups)[which]
            drawn = rng.integers(counts[which], size=self.batch)
            return size, [self.groups[size][int(i)] for i in drawn]
        epoch = self.epoch(number)
        if self._known is None or self._known[0] != epoch:
            self._known = epoch, self._shuffled(epoch)
        return self._known[1][number % self.per_epoch]

    def _shuffled(self, epoch: int) -> list[tuple[Size, list[int]]]:
        rng = np.random.default_rng((self.seed, 0, epoch))
        batches = []
        for size, rows in self.groups.items():
            mixed = [rows[int(i)] for i in rng.permutation(len(rows))]
            count = -(-len(rows) // self.batch)
            filled = [mixed[i % len(mixed)] for i in range(count * self.batch)]
            batches += [(size, filled[i * self.batch : (i + 1) * self.batch]) for i in range(count)]
        return [batches[int(i)] for i in rng.permutation(len(batches))]
