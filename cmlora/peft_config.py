"""Ranks and scales of a LoRA as PEFT's `LoraConfig` states them, and back."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from cmlora.errors import CmloraError
from cmlora.lora import Update

_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+")


def config(updates: Mapping[str, Update], *, anchored: bool = True) -> dict[str, Any]:
    """The arguments of the `LoraConfig` of one model, exact for every module.

    Args:
        updates: by module name within the model.
        anchored: patterns match the whole name; otherwise also behind a prefix that ends in a dot.
    """
    ranks = {name: update.rank for name, update in updates.items()}
    alphas = {name: alpha(update.scale, update.rank) for name, update in updates.items()}
    rank, usual = _most_common(ranks), _most_common(alphas)
    # Without the anchor a short name such as proj_out would also set what only ends like it.
    start = "^" if anchored else ""
    return {
        "r": rank,
        "lora_alpha": usual,
        "rank_pattern": {start + name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {start + name: a for name, a in alphas.items() if a != usual},
        "target_modules": sorted(updates),
    }


def alpha(scale: float, rank: int) -> float:
    """The alpha for which ``alpha / rank`` is ``scale``, to the bit wherever such a number exists.

    >>> alpha(1 / 3, 3)
    1.0
    """
    near = scale * rank
    candidates = [float(round(near)), near, math.nextafter(near, 0), math.nextafter(near, math.inf)]
    return next((a for a in candidates if a / rank == scale), near)


def scales(text: str | None, where: str) -> Mapping[str, Mapping[str, Any]]:
    """The configuration of every component from a file's ``lora_adapter_metadata``.

    Raises:
        CmloraError: if it is not what diffusers writes.
    """
    try:
        table = json.loads(text or "{}")
        configs: dict[str, dict[str, Any]] = {}
        for key, value in table.items():
            component, _, option = key.rpartition(".")
            configs.setdefault(component, {})[option] = value
        for settings in configs.values():
            float(settings.get("lora_alpha", settings.get("alpha", 8)))
            for option in ("r", "num_cayley_neumann_terms", "eps"):
                float(settings.get(option) or 0)
            for name, value in (settings.get("alpha_pattern") or {}).items():
                float(value)
                # The pattern comes from a stranger's file and could be one that runs for hours.
                if not _PLAIN.fullmatch(name):
                    raise ValueError
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise CmloraError(f"{where}: lora_adapter_metadata in the header is damaged") from None
    return configs


def scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """The scale of one module under a configuration; 1 if there is no configuration."""
    if not settings:
        return 1.0
    value = float(settings.get("lora_alpha", settings.get("alpha", 8)))  # PEFT's own default
    for pattern, found in (settings.get("alpha_pattern") or {}).items():
        name = pattern.removeprefix("^").replace("\\", "")
        names = {module, module.removeprefix("text_model.")}
        if name in names or (not pattern.startswith("^") and module.endswith(f".{name}")):
            value = float(found)
            break
    return value / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
