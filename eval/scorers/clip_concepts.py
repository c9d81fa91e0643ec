"""CLIPScore per concept: a picture against the trigger words of each of its LoRAs alone.

The score of the whole text can rise while one concept is lost; the lowest of these cannot.
"""

from __future__ import annotations

from collections.abc import Sequence

from cmlora.eval.manifest import Manifest
from cmlora.eval.scorers.clip_model import Clip, default_clip
from cmlora.eval.scorers.scorer import Item, Marks


class ClipConcepts:
    """CLIPScore against every LoRA's own trigger words.

    Args:
        manifest: the testbed.
        device: where to compute.
        model: see `cmlora.eval.scorers.clip_model.Clip`; the testbed's default if empty.
        pretrained: see there.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: str | None = None,
        *,
        model: str = "",
        pretrained: str = "",
    ) -> None:
        self._clip = Clip(*default_clip(manifest, model, pretrained), device)
        self.version = self._clip.version
        concepts = manifest.loras
        said = self._clip.texts([lora.trigger for lora in concepts])
        self._said = {lora.id: vector for lora, vector in zip(concepts, said, strict=True)}

    def __call__(self, items: Sequence[Item]) -> list[Marks]:
        """``clip_concepts``, the mean over the LoRAs, and ``clip_worst``, the lowest."""
        found = []
        for item, seen in zip(
            items, self._clip.images([item.image() for item in items]), strict=True
        ):
            marks = {id_: 100 * float(seen @ self._said[id_]) for id_ in item.ids}
            values = {
                "clip_concepts": sum(marks.values()) / len(marks),
                "clip_worst": min(marks.values()),
            }
            found.append(Marks(values, {id_: {"clip": mark} for id_, mark in marks.items()}))
        return found
