"""What a scorer sees and what it says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from cmlora.errors import CmloraError
from cmlora.eval.manifest import Manifest


@dataclass(frozen=True)
class Item:
    """A picture of a run, with what it was made for.

    Args:
        path: of the picture.
        ids: the LoRAs that should be in it.
        manifest: the testbed.
        record: what making it took: ``seconds``, ``full``, ``light``, ``macs``.
    """

    path: Path
    ids: tuple[str, ...]
    manifest: Manifest
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The whole prompt."""
        return self.manifest.prompt_of(self.ids)

    @property
    def clip_text(self) -> str:
        """The text that CLIPScore compares with, as the testbed says."""
        whole = self.manifest.clip_text == "prompt"
        return self.prompt if whole else self.manifest.triggers(self.ids)

    def image(self) -> Image.Image:
        """The picture's pixels."""
        try:
            with Image.open(self.path) as file:
                return file.convert("RGB")
        except OSError as error:
            raise CmloraError(f"cannot read the picture {self.path}: {error}") from None


@dataclass(frozen=True)
class Marks:
    """A scorer's answer for one picture.

    Args:
        values: numbers by metric name.
        concepts: the same per LoRA id, for scorers that look at each of them.
    """

    values: Mapping[str, float]
    concepts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Scorer(Protocol):
    """Judges pictures one by one: a mark depends on its own picture only."""

    @property
    def version(self) -> str:
        """The model and its weights; marks of different versions are never mixed."""

    def __call__(self, items: Sequence[Item]) -> list[Marks]:
        """Marks of some pictures, in their order."""


Maker = Callable[..., Scorer]
"""(manifest, device, **options) to a scorer; options are keyword arguments with defaults."""


def weights_digest(model: Any) -> str:
    """A short hash of a model's parameters and buffers."""
    digest = hashlib.blake2b(digest_size=6)
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def missing(what: str, place: str, failure: Exception, how: str) -> CmloraError:
    """The message about a model that is not here.

    Args:
        what: the scorer.
        place: where it was looked for.
        failure: what the library said.
        how: the command that gets it.
    """
    reason = next((line for line in str(failure).splitlines() if line.strip()), "")
    return CmloraError(
        f"{what}: the model {place} is not here and cannot be fetched "
        f"({type(failure).__name__}: {reason[:160]}); on a machine with a network: {how}"
    )
