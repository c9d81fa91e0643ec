"""What a merged model was made of, kept in the configurations of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from cmlora.pipelines.wider import read_config

_KEY = "_cmlora_merge"
"""A name with an underscore in front is passed over by diffusers without a word, and kept."""


def sign(models: Mapping[str, nn.Module], recipe: Mapping[str, Any]) -> None:
    """Write into the configurations of a pipeline's models what they were made of.

    Args:
        models: denoisers and text encoders by component; their configurations are changed.
        recipe: JSON types.
    """
    for model in models.values():
        known: Any = model
        if hasattr(known, "register_to_config"):
            known.register_to_config(**{_KEY: dict(recipe)})
        else:
            setattr(known.config, _KEY, dict(recipe))


def describe(folder: Path) -> dict[str, Any]:
    """Everything that the configurations of a diffusers folder say, as JSON types.

    Keys: file, bytes (of the weights), pipeline, parts (class by component), merge (what it was
    made of, or nothing), sha256 (of weights, configurations and vocabularies).

    Raises:
        CmloraError: if a configuration cannot be read.
    """
    from cmlora.pipelines.models import fingerprint

    index = read_config(folder / "model_index.json")
    rows = {name: row for name, row in index.items() if isinstance(row, list)}
    parts = {name: row[-1] for name, row in rows.items() if row and row[-1]}
    merge = None
    for name in parts:
        config = folder / name / "config.json"
        if merge is None and config.is_file():
            merge = read_config(config).get(_KEY)
    return {
        "file": str(folder),
        "bytes": sum(path.stat().st_size for path in folder.glob("*/*.safetensors")),
        "pipeline": index.get("_class_name"),
        "parts": parts,
        "merge": merge,
        "sha256": fingerprint(folder),
    }
