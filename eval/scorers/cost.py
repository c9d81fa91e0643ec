"""What a picture took, as the run recorded it."""

from __future__ import annotations

from collections.abc import Sequence

from cmlora.eval.manifest import Manifest
from cmlora.eval.scorers.scorer import Item, Marks


class Cost:
    """Seconds and multiply-accumulates.

    Args:
        manifest: not used.
        device: not used.
    """

    version = "1"

    def __init__(self, manifest: Manifest | None = None, device: str | None = None) -> None:
        del manifest, device

    def __call__(self, items: Sequence[Item]) -> list[Marks]:
        """``seconds``, ``gmacs`` if they were counted, and ``passes``, full and light."""
        found = []
        for item in items:
            values = {
                "seconds": float(item.record["seconds"]),
                "passes": float(item.record["full"] + item.record["light"]),
            }
            if item.record.get("macs") is not None:
                values["gmacs"] = item.record["macs"] / 1e9
            found.append(Marks(values))
        return found
