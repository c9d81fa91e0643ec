"""Scores that only the embedded world has: which concepts are really in a picture."""

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from statistics import fmean
from typing import Any

from PIL import Image

from cmlora.emoji import clip, truth
from cmlora.emoji.probe import Probe, load
from cmlora.emoji.world import BY_CONCEPT, ELEMENTS, Category, Element


def judge(pictures: Sequence[Image.Image], prompt: str, loras: Sequence[str]) -> dict[str, Any]:
    """Concepts found by the probe, fidelity, and CLIPScore.

    Args:
        pictures: 64x64 scenes.
        prompt: what they were made for.
        loras: ids of the concepts that should be in them; other names are left out.

    Returns:
        ``concepts``: per id the share of pictures with that very instance and with its class;
        ``instances`` and ``classes``: the means over the ids; ``fidelity``; ``clip_score``, unless
        open_clip is missing.
    """
    ids = [name for name in loras if name in BY_CONCEPT]
    scores: dict[str, Any] = {}
    if ids:
        seen = _probe().detect(pictures)
        found = {concept: _shares(BY_CONCEPT[concept], seen) for concept in ids}
        scores["concepts"] = found
        scores["instances"] = fmean(shares["instance"] for shares in found.values())
        scores["classes"] = fmean(shares["class"] for shares in found.values())
        scores["fidelity"] = truth.fidelity(pictures, ids)
    if find_spec("open_clip") is None:
        warnings.warn("no CLIPScore: pip install 'cmlora[eval]'", stacklevel=2)
    else:
        scores["clip_score"] = fmean(clip.score(pictures, [prompt] * len(pictures)))
    return scores


def _shares(wanted: Element, seen: Sequence[Mapping[Category, str | None]]) -> dict[str, float]:
    """How often a concept is in pictures: it itself, and anything of its class."""
    found = [picture[wanted.category] for picture in seen]
    kinds = {e.name: e.kind for e in ELEMENTS[wanted.category]}
    return {
        "instance": fmean(name == wanted.name for name in found),
        "class": fmean(name is not None and kinds[name] == wanted.kind for name in found),
    }


@cache
def _probe() -> Probe:
    return load()
