"""Scores that only the embedded world has: which concepts are really in a picture."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from PIL import Image

from cmlora.emoji import clip, truth
from cmlora.emoji.probe import Probe, load
from cmlora.emoji.world import BY_CONCEPT


def judge(pictures: Sequence[Image.Image], prompt: str, loras: Sequence[str]) -> dict[str, Any]:
    """Concepts found by the probe, fidelity, and CLIPScore.

    Args:
        pictures: 64x64 scenes.
        prompt: what they were made for.
        loras: ids of the concepts that should be in them; other names are left out.

    Returns:
        ``concepts``: per id the share of pictures with that very instance and with its class;
        ``instances`` and ``classes``: the means over the ids; ``fidelity``; ``clip_score``.
    """
    ids = [name for name in loras if name in BY_CONCEPT]
    seen = _probe().detect(pictures)
    concepts = {}
    for concept in ids:
        wanted = BY_CONCEPT[concept]
        found = [picture[wanted.category] for picture in seen]
        concepts[concept] = {
            "instance": sum(each == wanted.name for each in found) / len(found),
            "class": sum(_kind(each) == wanted.kind for each in found) / len(found),
        }
    means = {
        plural: sum(each[key] for each in concepts.values()) / len(concepts)
        for plural, key in (("instances", "instance"), ("classes", "class"))
        if concepts
    }
    marks = [float(mark) for mark in clip.score(pictures, [prompt] * len(pictures))]
    return {
        "concepts": concepts,
        **means,
        "fidelity": float(truth.fidelity(pictures, ids)),
        "clip_score": sum(marks) / len(marks),
    }


@cache
def _probe() -> Probe:
    return load()


@cache
def _kinds() -> dict[str, str]:
    from cmlora.emoji.world import ELEMENTS

    return {e.name: e.kind for group in ELEMENTS.values() for e in group}


def _kind(instance: str | None) -> str | None:
    """The class of an instance; ``None`` for nothing."""
    return None if instance is None else _kinds().get(instance)
