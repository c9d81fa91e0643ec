"""The small CLIP of the emoji world, in open_clip format, and CLIPScore with it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cmlora.emoji.paths import WEIGHTS
from cmlora.emoji.probe import to_batch
from cmlora.emoji.tokens import LENGTH
from cmlora.errors import CmloraError

CLIP_FOLDER = WEIGHTS / "clip"
MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 96,
    "vision_cfg": {
        "image_size": 64,
        "layers": 4,
        "width": 128,
        "head_width": 32,
        "patch_size": 8,
        "mlp_ratio": 3.0,
    },
    "text_cfg": {
        "context_length": LENGTH,
        "width": 128,
        "heads": 4,
        "layers": 3,
        "hf_tokenizer_name": "tokenizer",
    },
}
"""open_clip's `model_cfg`; the vocabulary's size is added when it is trained."""


def open_clip() -> Any:
    """The open_clip package, or an error that says how to get it."""
    try:
        import open_clip as package
    except ImportError as error:
        raise CmloraError("CLIPScore needs open_clip: pip install 'cmlora[eval]'") from error
    return package


@cache
def load(folder: Path = CLIP_FOLDER) -> tuple[Any, Any]:
    """The shipped model and its tokenizer."""
    package = open_clip()
    model = package.create_model(f"local-dir:{folder}")
    model.eval()
    from transformers import CLIPTokenizer

    return model, CLIPTokenizer.from_pretrained(folder / "tokenizer")


@torch.no_grad()
def score(pictures: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
    """CLIPScore, 100 times the cosine of picture and text.

    Args:
        pictures: n pictures.
        texts: n texts, one per picture.

    Returns:
        n numbers between -100 and 100.
    """
    if len(pictures) != len(texts):
        raise ValueError(f"{len(pictures)} pictures for {len(texts)} texts")
    model, tokenizer = load()
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
    seen = model.encode_image(to_batch(pictures), normalize=True)
    said = model.encode_text(tokens.input_ids, normalize=True)
    marks: list[float] = (100 * (seen * said).sum(1)).tolist()
    return marks
