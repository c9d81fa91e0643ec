"""One call of a denoiser, and what the features of its passes are kept under."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from diffusers.hooks.hooks import CacheContext

    from cmlora.tracker import Tick


class Slot(NamedTuple):
    """Where a pass's features are kept; two passes never have the same one.

    Args:
        loras: the LoRAs of the pass, sorted; the base model has none.
        ordinal: tells apart passes with the same LoRAs.
        branch: of guidance, where the pipeline calls the denoiser once per branch.
        shape: of the denoiser's input: a feature fits no other.
    """

    loras: tuple[str, ...]
    ordinal: int
    branch: str
    shape: tuple[int, ...]

    @property
    def context(self) -> str:
        """A name for diffusers' cache context."""
        return f"{self.branch}/{self.loras!r}#{self.ordinal}"


class Call(NamedTuple):
    """One call of the denoiser by the pipeline.

    Args:
        args: as the pipeline gives them.
        kwargs: as the pipeline gives them.
        tick: where the run is.
        context: the cache context the pipeline set, if it sets one.
        sample: what goes in, if it is one tensor.
        guidance: the scale of guidance if the batch is doubled, the unconditional half first.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tick: Tick
    context: CacheContext | None
    sample: torch.Tensor | None
    guidance: float | None
