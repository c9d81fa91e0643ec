"""Similarity to reference pictures: each LoRA's pictures against what was made with it.

The mean over a LoRA's references of the cosine of image features, times 100; DINOv2
(arXiv:2304.07193) sees identity and texture, CLIP rather what kind of thing it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cmlora.eval.manifest import Manifest
from cmlora.eval.scorers.clip_model import Clip, default_clip
from cmlora.eval.scorers.references import reference_pictures
from cmlora.eval.scorers.scorer import Item, Marks, missing, weights_digest

Embed = Callable[[Sequence[Image.Image]], Tensor]


class _Likeness:
    """Compares features of pictures with those of the references.

    Args:
        name: of the metric.
        embed: pictures to unit vectors (n, features).
        references: pictures by LoRA id.
    """

    def __init__(
        self, name: str, embed: Embed, references: Mapping[str, Sequence[Image.Image]]
    ) -> None:
        self._name, self._embed = name, embed
        self._means = {id_: embed(pictures).mean(0) for id_, pictures in references.items()}

    def __call__(self, items: Sequence[Item]) -> list[Marks]:
        """The mean over the LoRAs of a set, and the mark of each."""
        found = []
        for item, seen in zip(items, self._embed([i.image() for i in items]), strict=True):
            marks = {id_: 100 * float(seen @ self._means[id_]) for id_ in item.ids}
            mean = sum(marks.values()) / len(marks)
            found.append(Marks({self._name: mean}, {i: {self._name: m} for i, m in marks.items()}))
        return found


class ClipImage(_Likeness):
    """Likeness to reference pictures by CLIP's image features.

    Args:
        manifest: the testbed.
        device: where to compute.
        model: see `cmlora.eval.scorers.clip_model.Clip`; the testbed's default if empty.
        pretrained: see there.
        references: see `cmlora.eval.scorers.references.reference_pictures`.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: str | None = None,
        *,
        model: str = "",
        pretrained: str = "",
        references: str = "",
    ) -> None:
        pictures = reference_pictures(manifest, references)
        clip = Clip(*default_clip(manifest, model, pretrained), device)
        self.version = f"{clip.version} {_digest(pictures)}"
        super().__init__("clip_image", clip.images, pictures)


class DinoImage(_Likeness):
    """Likeness to reference pictures by the class token of a vision transformer, DINOv2's.

    Args:
        manifest: the testbed.
        device: where to compute.
        model: a transformers image model by folder or hub id.
        references: see `cmlora.eval.scorers.references.reference_pictures`.

    Raises:
        CmloraError: if the model is missing.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: str | None = None,
        *,
        model: str = "facebook/dinov2-base",
        references: str = "",
    ) -> None:
        pictures = reference_pictures(manifest, references)
        network, processor = _dino(model)
        network.to(torch.device(device or "cpu"))

        @torch.no_grad()
        def embed(images: Sequence[Image.Image]) -> Tensor:
            values = processor(images=list(images), return_tensors="pt").to(network.device)
            token = network(**values).last_hidden_state[:, 0].float().cpu()
            return torch.nn.functional.normalize(token, dim=-1)

        self.version = f"{Path(model).name} {weights_digest(network)} {_digest(pictures)}"
        super().__init__("dino_image", embed, pictures)


def _dino(model: str) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModel

    try:
        network = AutoModel.from_pretrained(model, use_safetensors=True)
        return network.eval(), AutoImageProcessor.from_pretrained(model)
    except Exception as failure:  # transformers and the hub have many
        raise missing("dino_image", model, failure, f"hf download {model}") from failure


def _digest(references: Mapping[str, Sequence[Image.Image]]) -> str:
    import hashlib

    digest = hashlib.blake2b(digest_size=6)
    for id_, pictures in sorted(references.items()):
        digest.update(id_.encode())
        for picture in pictures:
            digest.update(picture.tobytes())
    return digest.hexdigest()
