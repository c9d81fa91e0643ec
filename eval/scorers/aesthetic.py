"""How pleasing a picture is, by any image classifier that was trained to say so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cmlora.errors import CmloraError
from cmlora.eval.manifest import Manifest
from cmlora.eval.scorers.scorer import Item, Marks, missing, weights_digest


class Aesthetic:
    """The probability of one label of an image classifier, or its single output.

    Args:
        manifest: the testbed.
        device: where to compute.
        model: a transformers image classifier by folder or hub id, in safetensors; there is none
            by default, because there is no standard one.
        label: whose probability is the score; not needed for a model with a single output.

    Raises:
        CmloraError: if no model is given, it is missing, or it has no such label.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: str | None = None,
        *,
        model: str = "",
        label: str = "aesthetic",
    ) -> None:
        if not model:
            raise CmloraError(
                "aesthetic needs a classifier: --set aesthetic.model=FOLDER_OR_HUB_ID, and "
                "--set aesthetic.label=... for the label that means beautiful"
            )
        self._model, self._processor = _loaded(model)
        self._model.to(torch.device(device or "cpu"))
        labels = {str(v): int(k) for k, v in self._model.config.id2label.items()}
        self._place = None if len(labels) == 1 else labels.get(label)
        if len(labels) > 1 and self._place is None:
            raise CmloraError(f"{model} has no label {label!r}; it has {', '.join(labels)}")
        self.version = f"{Path(model).name} {label} {weights_digest(self._model)}"

    @torch.no_grad()
    def __call__(self, items: Sequence[Item]) -> list[Marks]:
        """``aesthetic`` of every picture; more is better."""
        images = [item.image() for item in items]
        values = self._processor(images=images, return_tensors="pt").to(self._model.device)
        logits = self._model(**values).logits.float()
        shares = logits[:, 0] if self._place is None else logits.softmax(1)[:, self._place]
        return [Marks({"aesthetic": float(share)}) for share in shares]


def _loaded(model: str) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        loaded = AutoModelForImageClassification.from_pretrained(model, use_safetensors=True)
        return loaded.eval(), AutoImageProcessor.from_pretrained(model)
    except Exception as failure:  # transformers and the hub have many
        raise missing("aesthetic", model, failure, f"hf download {model}") from failure
