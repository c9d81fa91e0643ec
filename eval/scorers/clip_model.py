"""A CLIP by open_clip, of any architecture: pictures and texts to directions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cmlora.emoji.clip import open_clip
from cmlora.errors import CmloraError
from cmlora.eval.manifest import Manifest
from cmlora.eval.scorers.scorer import missing, weights_digest

EMBEDDED = "emoji"


class Clip:
    """Image and text encoders with one common space.

    Args:
        model: an open_clip architecture, ``hf-hub:owner/name``, ``local-dir:FOLDER`` or a folder
            in open_clip's format, or ``emoji`` for the small one of the embedded world.
        pretrained: open_clip's name of the weights, or a ``.safetensors`` file; for architectures.
        device: where to compute.

    Raises:
        CmloraError: if open_clip or the weights are missing, or the weights are a pickle.
    """

    def __init__(self, model: str, pretrained: str = "", device: str | None = None) -> None:
        self.device = torch.device(device or "cpu")
        if model == EMBEDDED:
            self._model, self._preprocess, self._tokenize = _embedded()
        else:
            self._model, self._preprocess, self._tokenize = _opened(model, pretrained)
        self._model.to(self.device).eval()
        name = f"{model} {pretrained}".strip()
        self.version = f"open_clip {name} {weights_digest(self._model)}"

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures to unit vectors, (n, features), on the CPU."""
        batch = torch.stack([self._preprocess(picture) for picture in pictures]).to(self.device)
        return _unit(self._model.encode_image(batch))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to unit vectors, (n, features), on the CPU."""
        return _unit(self._model.encode_text(self._tokenize(list(texts)).to(self.device)))


def default_clip(manifest: Manifest, model: str, pretrained: str) -> tuple[str, str]:
    """The model asked for; else the embedded one for the embedded world, ViT-B-16 otherwise."""
    if model:
        return model, pretrained
    return (EMBEDDED, "") if manifest.model == EMBEDDED else ("ViT-B-16", pretrained or "openai")


def _embedded() -> tuple[Any, Any, Any]:
    from cmlora.emoji import clip, weights
    from cmlora.emoji.probe import to_batch

    open_clip()
    if not weights.available():
        raise CmloraError("clip_score: the embedded CLIP is not in this installation")
    model, tokenizer = clip.load()

    def tokenize(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        ids: Tensor = tokens.input_ids
        return ids

    return model, lambda picture: to_batch([picture])[0], tokenize


def _opened(model: str, pretrained: str) -> tuple[Any, Any, Any]:
    package = open_clip()
    folder = Path(model.removeprefix("local-dir:")).expanduser()
    is_hub, is_folder = model.startswith("hf-hub:"), folder.is_dir()
    name = f"local-dir:{folder}" if is_folder else model
    if pretrained.endswith((".pt", ".bin", ".pth", ".ckpt")):
        raise CmloraError(f"clip weights {pretrained}: pickles can run code and are not read")
    if not (is_hub or is_folder) and model not in package.list_models():
        raise CmloraError(
            f"open_clip knows no architecture {model!r}, and it is no folder; for example ViT-B-16"
        )
    options: dict[str, Any] = {}
    if not (is_hub or is_folder):
        config = package.get_pretrained_cfg(model, pretrained) or {}
        # OpenAI's weights need the activation they were trained with; open_clip only warns
        options = {"pretrained": pretrained, "force_quick_gelu": bool(config.get("quick_gelu"))}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded, _, preprocess = package.create_model_and_transforms(
                name, require_pretrained=True, **options
            )
            tokenizer = package.get_tokenizer(name)
    except Exception as failure:  # open_clip and the hub have many
        shown = f"{model}, {pretrained}" if pretrained else model
        how = f'python -c "import open_clip; open_clip.create_model({model!r}, {pretrained!r})"'
        raise missing("clip", shown, failure, how) from failure
    return loaded, preprocess, tokenizer


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu()
