"""The numbers that reports show: what each is called, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["more", "less", "neither"]


@dataclass(frozen=True)
class Metric:
    """A column of a report.

    Args:
        name: as scorers call it.
        title: as people read it.
        better: which way.
        digits: behind the point.
    """

    name: str
    title: str
    better: Better = "more"
    digits: int = 2


METRICS = {
    metric.name: metric
    for metric in (
        Metric("instances", "concepts found", digits=3),
        Metric("classes", "classes found", digits=3),
        Metric("fidelity", "distance to truth", "less", digits=3),
        Metric("clip_score", "CLIPScore"),
        Metric("clip_concepts", "CLIPScore per concept"),
        Metric("clip_worst", "CLIPScore of the worst concept"),
        Metric("clip_image", "CLIP likeness"),
        Metric("dino_image", "DINO likeness"),
        Metric("pick_score", "PickScore"),
        Metric("hps", "HPSv2"),
        Metric("image_reward", "ImageReward", digits=3),
        Metric("aesthetic", "aesthetic", digits=3),
        Metric("sharpness", "sharpness", "neither", digits=3),
        Metric("saturation", "saturation", "neither", digits=3),
        Metric("contrast", "contrast", "neither", digits=3),
        Metric("clipped", "clipped values", "neither", digits=3),
        Metric("gmacs", "GMACs per picture", "less", digits=1),
        Metric("seconds", "seconds per picture", "less"),
        Metric("passes", "passes per picture, light ones included", "neither", digits=0),
    )
}
"""By name, in the order of reports."""

PER_CONCEPT = {"instance": "found", "class": "class found", "clip": "CLIPScore"}
"""Marks of single concepts, and their titles."""


def metric_of(name: str) -> Metric:
    """A metric by name; one of your own is taken for better the larger it is."""
    return METRICS.get(name, Metric(name, name.replace("_", " "), digits=3))
