"""Latents and text embeddings of a training, computed once and kept in memory or on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from cmlora import container
from cmlora.adapters.training.autoencoder import encoded, factor
from cmlora.adapters.training.buckets import Size, fitted, nearest
from cmlora.adapters.training.conditioning import Conditioning, denoiser_of
from cmlora.adapters.training.pictures import Example
from cmlora.adapters.training.trees import Tree
from cmlora.denoisers import kind
from cmlora.errors import CmloraError


class Latents:
    """The latents of pictures.

    Args:
        pipe: whose autoencoder makes them.
        examples: the pictures.
        choices: sizes they may be brought to.
        cache: "memory", "disk" or "none".
        folder: of the disk's cache.
        flip: mirrored pictures are numbered behind the others.
    """

    def __init__(
        self,
        pipe: Any,
        examples: Sequence[Example],
        choices: Sequence[Size],
        cache: str = "memory",
        folder: Path | None = None,
        flip: bool = False,
    ) -> None:
        self.vae = getattr(pipe, "vae", None)
        self.examples, self.cache, self.folder = list(examples), cache, folder
        self.count = len(examples) * (2 if flip else 1)
        self.factor = factor(pipe)
        # Transformers that read tokens or frames make patches of two by two latents.
        self._patch = 1 if kind(denoiser_of(pipe)[1]).latent == "maps" else 2
        self._kept: dict[int, Tensor] = {}
        self._model = _fingerprint(self.vae) if cache == "disk" else ""
        self.sizes = [self._size(example, choices) for example in examples]
        if self.vae is None and any(not isinstance(e.picture, Tensor) for e in examples):
            raise CmloraError(f"{type(pipe).__name__} has no autoencoder to encode pictures with")

    def groups(self) -> dict[Size, list[int]]:
        """The pictures' numbers by size."""
        found: dict[Size, list[int]] = {}
        for number in range(self.count):
            found.setdefault(self.sizes[number % len(self.sizes)], []).append(number)
        return found

    def get(self, numbers: Sequence[int]) -> Tensor:
        """Latents (B, C, H, W), scaled as the denoiser wants them."""
        return torch.stack([self._one(number) for number in numbers])

    def _one(self, number: int) -> Tensor:
        if number in self._kept:
            return self._kept[number]
        example = self.examples[number % len(self.examples)]
        mirrored = number >= len(self.examples)
        if isinstance(example.picture, Tensor):
            found = example.picture.flip(-1) if mirrored else example.picture
        else:
            found = self._from_disk(example, number, mirrored)
        if self.cache != "none":
            self._kept[number] = found
        return found

    def _from_disk(self, example: Example, number: int, mirrored: bool) -> Tensor:
        size = self.sizes[number % len(self.sizes)]
        if self.cache != "disk" or self.folder is None:
            return self._encoded(example, size, mirrored)
        text = f"{Example(example.picture, '').digest()} {size} {mirrored} {self._model}"
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
        if path.is_file():
            return container.content(path)[0]["latents"]
        found = self._encoded(example, size, mirrored)
        self.folder.mkdir(parents=True, exist_ok=True)
        container.save(path, {"latents": found}, {})
        return found

    def _encoded(self, example: Example, size: Size, mirrored: bool) -> Tensor:
        picture = fitted(example.open(), size)
        if mirrored:
            picture = ImageOps.mirror(picture)
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 127.5 - 1
        return encoded(self.vae, pixels[None])[0]

    def _size(self, example: Example, choices: Sequence[Size]) -> Size:
        if isinstance(example.picture, Tensor):
            if example.picture.ndim != 3:
                raise CmloraError(f"latents are {tuple(example.picture.shape)}, not (C, H, W)")
            height, width = example.picture.shape[1:]
            found = width * self.factor, height * self.factor
        else:
            found = nearest(example.open().size, choices)
        step = self.factor * self._patch
        if self._patch > 1 and (found[0] % step or found[1] % step):
            raise CmloraError(
                f"train: pictures of {found[0]}x{found[1]} pixels are no multiples of {step}, "
                "which this model needs; change resolution or bucket_step"
            )
        return found


class Texts:
    """The denoiser's further arguments for captions.

    Args:
        conditioning: that makes them.
        trained: whether the text encoders change.
        keep: whether to keep what was encoded; not if they change, and not for captions that are
            drawn anew at every use.
        limit: of captions that are kept.
    """

    def __init__(
        self, conditioning: Conditioning, trained: bool, keep: bool, limit: int = 4096
    ) -> None:
        self.conditioning, self.trained = conditioning, trained
        self.limit = limit if keep and not trained else 0
        self._kept: dict[tuple[str, Size], Tree] = {}

    def get(self, texts: Sequence[str], size: Size) -> Tree:
        """The arguments for a batch."""
        if not self.limit:
            return self.conditioning.encode(texts, size, self.trained)
        rows = []
        for text in texts:
            row = self._kept.get((text, size))
            if row is None:
                # One by one: in a batch the last bits would depend on what is kept already.
                row = self.conditioning.cut(self.conditioning.encode([text], size), size)[0]
                if len(self._kept) < self.limit:
                    self._kept[text, size] = row
            rows.append(row)
        return self.conditioning.join(rows, size)


def _fingerprint(model: Any) -> str:
    """Changes with the weights of a model."""
    if model is None:
        return ""
    found = hashlib.sha256(json.dumps(dict(model.config), sort_keys=True, default=str).encode())
    for key, tensor in sorted(model.state_dict().items()):
        found.update(key.encode() + tensor.detach().float().sum().cpu().numpy().tobytes())
    return found.hexdigest()
