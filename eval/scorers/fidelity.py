"""How far a picture of the embedded world is from renders of exactly its concepts."""

from __future__ import annotations

from collections.abc import Sequence

from cmlora.emoji import probe, truth
from cmlora.eval.manifest import Manifest
from cmlora.eval.scorers.probe import check_world
from cmlora.eval.scorers.scorer import Item, Marks, weights_digest


class Fidelity:
    """Squared kernel distance of one picture to the mean of 128 renders of its set.

    Args:
        manifest: the testbed; its LoRAs must be concepts of the embedded world.
        device: not used; the classifier is small.

    Raises:
        CmloraError: see `cmlora.eval.scorers.probe.ProbeScore`.
    """

    def __init__(self, manifest: Manifest, device: str | None = None) -> None:
        check_world(manifest, "fidelity")
        self.version = f"emoji truth {weights_digest(probe.load())} {truth.RENDERS}"

    def __call__(self, items: Sequence[Item]) -> list[Marks]:
        """``fidelity`` of every picture; less is better."""
        return [Marks({"fidelity": truth.fidelity([i.image()], i.ids)}) for i in items]
