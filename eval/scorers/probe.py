"""Which concepts are really in a picture of the embedded world, by its classifier."""

from __future__ import annotations

from collections.abc import Sequence

from cmlora.emoji import probe, weights
from cmlora.emoji.world import BY_CONCEPT, ELEMENTS
from cmlora.errors import CmloraError
from cmlora.eval.manifest import Manifest
from cmlora.eval.scorers.scorer import Item, Marks, weights_digest


class ProbeScore:
    """Share of a set's concepts that are found: the very one, and anything of its class.

    Args:
        manifest: the testbed; its LoRAs must be concepts of the embedded world.
        device: not used; the classifier is small.

    Raises:
        CmloraError: if they are not, or the classifier is not in this installation.
    """

    def __init__(self, manifest: Manifest, device: str | None = None) -> None:
        check_world(manifest, "probe")
        self._probe = probe.load()
        self.version = f"emoji probe {weights_digest(self._probe)}"

    def __call__(self, items: Sequence[Item]) -> list[Marks]:
        """``instances`` and ``classes``: shares of the set's concepts, 0 to 1."""
        found = []
        for item, seen in zip(
            items, self._probe.detect([item.image() for item in items]), strict=True
        ):
            marks = {}
            for id_ in item.ids:
                wanted = BY_CONCEPT[id_]
                name = seen[wanted.category]
                kinds = {e.name: e.kind for e in ELEMENTS[wanted.category]}
                same = name is not None and kinds[name] == wanted.kind
                marks[id_] = {"instance": float(name == wanted.name), "class": float(same)}
            values = {
                "instances": sum(m["instance"] for m in marks.values()) / len(marks),
                "classes": sum(m["class"] for m in marks.values()) / len(marks),
            }
            found.append(Marks(values, marks))
        return found


def check_world(manifest: Manifest, scorer: str) -> None:
    """Raises `CmloraError` unless a testbed is one of the embedded world and that is here."""
    unknown = [lora.id for lora in manifest.loras if lora.id not in BY_CONCEPT]
    if unknown:
        raise CmloraError(
            f"{scorer} knows the concepts of the embedded world only, not {unknown[0]!r}"
        )
    if not weights.available() or not probe.PROBE_FILE.is_file():
        raise CmloraError(f"{scorer}: the embedded model is not in this installation")
