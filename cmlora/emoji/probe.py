"""The probe: a small classifier that says which elements a picture shows, category by category."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from cmlora.emoji.paths import WEIGHTS
from cmlora.emoji.world import CATEGORIES, ELEMENTS, SIZE, Category

FEATURES = 192
PROBE_FILE = WEIGHTS / "probe.safetensors"


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm around a skip."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.first(x)))
        return torch.relu(self.norm2(self.second(inner)) + self.skip(x))


class Probe(nn.Module):
    """A residual network with one softmax per category; output 0 of each means "nothing"."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 5, 2, 2, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.blocks = nn.Sequential(
            _Block(24, 48, 2), _Block(48, 96, 2), _Block(96, 128, 2), _Block(128, FEATURES, 2)
        )
        sizes = {c: 1 + len(ELEMENTS[c]) for c in CATEGORIES}
        self.heads = nn.ModuleDict({c: nn.Linear(FEATURES * 4, size) for c, size in sizes.items()})

    def features(self, pictures: Tensor) -> Tensor:
        """(n, 3, 64, 64) in -1..1 to (n, 768): the last 2x2 map, flattened."""
        x = torch.relu(self.norm(self.stem(pictures)))
        out: Tensor = self.blocks(x).flatten(1)
        return out

    def forward(self, pictures: Tensor) -> dict[Category, Tensor]:
        """(n, 3, 64, 64) in -1..1 to logits per category, (n, 1 + elements)."""
        inner = self.features(pictures)
        return {c: self.heads[c](inner) for c in CATEGORIES}

    @torch.no_grad()
    def detect(self, pictures: Sequence[Image.Image]) -> list[dict[Category, str | None]]:
        """The most likely element of every category in every picture.

        Args:
            pictures: of any size; they are brought to 64x64.

        Returns:
            Per picture and category the element's name, or ``None`` for nothing.
        """
        found: dict[Category, list[int]] = {
            c: logits.argmax(1).tolist() for c, logits in self(to_batch(pictures)).items()
        }
        names: dict[Category, list[str | None]] = {
            c: [None, *(e.name for e in ELEMENTS[c])] for c in CATEGORIES
        }
        return [
            {c: names[c][found[c][index]] for c in CATEGORIES} for index in range(len(pictures))
        ]


def to_batch(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures to (n, 3, 64, 64) in -1..1."""
    small = [
        np.asarray(p.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        for p in pictures
    ]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1


def load(path: Path = PROBE_FILE) -> Probe:
    """The shipped probe, ready to use."""
    probe = Probe()
    probe.load_state_dict({k: v.float() for k, v in load_file(path).items()}, strict=False)
    probe.eval()
    return probe
