"""What people prefer, by dual encoders that were trained on their votes.

PickScore (arXiv:2305.01569) and HPSv2 (arXiv:2306.09341) are CLIPs whose scaled cosine of prompt
and picture is the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cmlora.eval.manifest import Manifest
from cmlora.eval.scorers.scorer import Item, Marks, missing, weights_digest


class Preference:
    """The scaled cosine of a picture and its whole prompt.

    Args:
        manifest: the testbed.
        device: where to compute.
        name: of the metric.
        model: a transformers ``CLIPModel`` by folder or hub id, in safetensors.
        processor: where its preprocessing is, if it is not with the model.

    Raises:
        CmloraError: if the model is missing.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: str | None = None,
        *,
        name: str,
        model: str,
        processor: str = "",
    ) -> None:
        self._name = name
        self._model, self._processor = _loaded(name, model, processor or model)
        self._model.to(torch.device(device or "cpu"))
        self.version = f"{Path(model).name} {weights_digest(self._model)}"

    @torch.no_grad()
    def __call__(self, items: Sequence[Item]) -> list[Marks]:
        """The preference score of every picture; more is better."""
        values = self._processor(
            text=[item.prompt for item in items],
            images=[item.image() for item in items],
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self._model.device)
        scores = self._model(**values).logits_per_image.diagonal()
        return [Marks({self._name: float(score)}) for score in scores]


class PickScore(Preference):
    """PickScore; see `Preference`."""

    def __init__(
        self,
        manifest: Manifest,
        device: str | None = None,
        *,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "",
    ) -> None:
        super().__init__(manifest, device, name="pick_score", model=model, processor=processor)


class HumanPreference(Preference):
    """HPSv2; see `Preference`."""

    def __init__(
        self,
        manifest: Manifest,
        device: str | None = None,
        *,
        model: str = "adams-story/HPSv2-hf",
        processor: str = "",
    ) -> None:
        super().__init__(manifest, device, name="hps", model=model, processor=processor)


def _loaded(name: str, model: str, processor: str) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    try:
        loaded = CLIPModel.from_pretrained(model, use_safetensors=True)
        return loaded.eval(), CLIPProcessor.from_pretrained(processor)
    except Exception as failure:  # transformers and the hub have many
        raise missing(name, model, failure, f"hf download {model}") from failure
