"""CLIPScore: how well a picture fits its trigger words, 100 times the cosine.

Hessel et al., arXiv:2104.08718, without the factor 2.5 and the cut at zero, as the field has it.
"""

from __future__ import annotations

from collections.abc import Sequence

from cmlora.eval.manifest import Manifest
from cmlora.eval.scorers.clip_model import Clip, default_clip
from cmlora.eval.scorers.scorer import Item, Marks


class ClipScore:
    """CLIPScore against the testbed's text.

    Args:
        manifest: the testbed; it says whether the text is the triggers or the whole prompt.
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
        self.version = f"{self._clip.version} {manifest.clip_text}"

    def __call__(self, items: Sequence[Item]) -> list[Marks]:
        """``clip_score`` of every picture."""
        seen = self._clip.images([item.image() for item in items])
        said = self._clip.texts([item.clip_text for item in items])
        return [Marks({"clip_score": float(mark)}) for mark in 100 * (seen * said).sum(1)]
