"""Fidelity: how far generated pictures are from renders of the very same elements.

Presence of the right elements says nothing about muddied colours or broken neighbours. Any set of
concepts can be rendered exactly, so generated pictures can be compared with the truth: the kernel
distance (MMD with the cubic polynomial kernel of KID, arXiv:1801.01401) of the probe's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmlora.emoji.probe import Probe, load, to_batch
from cmlora.emoji.scenes import render, scene_of

RENDERS = 128


@cache
def _probe() -> Probe:
    return load()


@cache
@torch.no_grad()
def _render_features(concepts: tuple[str, ...]) -> Tensor:
    """Normalised features of renders of a set, (128, F); jitter and plain grounds vary."""
    scene = scene_of(concepts)
    pictures = [
        Image.fromarray(render(scene, np.random.default_rng((11, index))))
        for index in range(RENDERS)
    ]
    return _features(pictures)


def _features(pictures: Sequence[Image.Image]) -> Tensor:
    with torch.no_grad():
        inner = _probe().features(to_batch(pictures))
    return torch.nn.functional.normalize(inner, dim=1)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD with kernel (x.y + 1)^3 of normalised features (n, F), (m, F).

    With fewer than two pictures on a side the biased estimate is used there.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        if len(x) < 2:
            return k.mean()
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def fidelity(pictures: Sequence[Image.Image], concepts: Sequence[str]) -> float:
    """Kernel distance between pictures and 128 renders of exactly these concepts.

    Args:
        pictures: generated for the set.
        concepts: ids ("character_1", ...), one per category at most.

    Returns:
        0 for indistinguishable (it may fall slightly below), larger is worse.
    """
    return kernel_distance(_features(pictures), _render_features(tuple(sorted(concepts))))
