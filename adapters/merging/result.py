"""What a merge gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cmlora.lora import LoRA

LOST = "lost_to_rank"
"""The note about what a cut to a rank leaves out."""


@dataclass(frozen=True)
class Report:
    """What a merge cost and what it changed.

    Args:
        method: its name.
        kind: what its weights mean, see `Method`.
        errors: by block of the model, distance from the exact weighted sum relative to it.
        error: the same over all modules.
        rank: the largest rank of a module.
        bytes: of the merged factors.
        seconds: it took.
        notes: means over the modules of what the method says of itself; and ``lost_to_rank``, what
            a cut to a rank leaves out of the method's result, relative to its norm.
        warnings: what the user should know.
    """

    method: str
    kind: str
    errors: Mapping[str, float]
    error: float
    rank: int
    bytes: int
    seconds: float
    notes: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def remarks(self) -> dict[str, str]:
        """The notes in words."""
        of = {LOST: "of the norm"}
        return {
            key.replace("_", " "): f"{part:.1%} {of.get(key, 'of entries')}"
            for key, part in self.notes.items()
        }


@dataclass(frozen=True)
class MergeResult:
    """A merged LoRA, with scale 1 everywhere, and the report about it."""

    lora: LoRA
    report: Report
