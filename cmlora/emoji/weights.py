"""The shipped weights of the emoji world: base model, LoRAs, CLIP, probe."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cmlora.emoji.paths import WEIGHTS
from cmlora.emoji.world import CONCEPTS
from cmlora.errors import CmloraError

LORAS: tuple[str, ...] = tuple(e.concept for e in CONCEPTS if e.concept)
"""Ids of the eleven concepts: character_1 ... object_2."""

Series = Literal["biased", "unbiased"]
STEPS = 30
GUIDANCE = 4.0
"""Sampling steps and guidance scale that the model was made for."""


def model_path() -> Path:
    """Folder of the base model in diffusers format."""
    return WEIGHTS / "model"


def lora_path(concept: str, series: Series = "biased") -> Path:
    """File of a concept's LoRA.

    Args:
        concept: "character_1" ... "object_2".
        series: ``biased`` LoRAs come from 32 pictures with a narrow context, as people's do;
            ``unbiased`` ones from as many with all contexts.

    Raises:
        CmloraError: for an unknown concept.
    """
    if concept not in LORAS:
        raise CmloraError(f"no embedded LoRA {concept!r}; there are {', '.join(LORAS)}")
    folder = WEIGHTS / ("loras" if series == "biased" else "loras_unbiased")
    return folder / f"{concept}.safetensors"


def available() -> bool:
    """Whether the weights are in this installation."""
    return (model_path() / "model_index.json").is_file()
