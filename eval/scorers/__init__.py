"""Judges of single pictures, by name. Scoring never makes a picture."""

from __future__ import annotations

from cmlora.eval.scorers.aesthetic import Aesthetic
from cmlora.eval.scorers.clip_concepts import ClipConcepts
from cmlora.eval.scorers.clip_score import ClipScore
from cmlora.eval.scorers.cost import Cost
from cmlora.eval.scorers.fidelity import Fidelity
from cmlora.eval.scorers.image_reward import ImageReward
from cmlora.eval.scorers.likeness import ClipImage, DinoImage
from cmlora.eval.scorers.preference import HumanPreference, PickScore
from cmlora.eval.scorers.probe import ProbeScore
from cmlora.eval.scorers.sanity import Sanity
from cmlora.eval.scorers.scorer import Maker
from cmlora.registry import Entry, Registry

SCORERS: Registry[Maker] = Registry(
    "scorer",
    Entry("clip_score", ClipScore, "picture against all trigger words", "arXiv:2104.08718"),
    Entry("clip_concepts", ClipConcepts, "picture against each LoRA's words, mean and lowest"),
    Entry("probe", ProbeScore, "concepts that are really there, emoji only"),
    Entry("fidelity", Fidelity, "distance to renders of the same concepts, emoji only"),
    Entry("clip_image", ClipImage, "likeness to reference pictures of the LoRAs, by CLIP"),
    Entry("dino_image", DinoImage, "the same by DINOv2", "arXiv:2304.07193"),
    Entry("pick_score", PickScore, "what people would pick", "arXiv:2305.01569"),
    Entry("hps", HumanPreference, "what people prefer, HPSv2", "arXiv:2306.09341"),
    Entry("image_reward", ImageReward, "what people reward, by a BLIP", "arXiv:2304.05977"),
    Entry("aesthetic", Aesthetic, "how pleasing, by a classifier of yours"),
    Entry("sanity", Sanity, "sharpness, saturation, contrast, clipped values"),
    Entry("cost", Cost, "seconds and multiply-accumulates, as recorded"),
)

USUAL = ("clip_score", "clip_concepts", "sanity", "cost")
"""What is scored unless scorers are named; the embedded world adds its own two."""
