"""MagCache by text: its table of magnitudes belongs to a model, its length to a run.

The residual of all blocks, x_out - x_in, changes its length from step to step by a ratio that
hardly depends on the prompt. Where the product of the ratios since the last full step is near
enough to 1, the residual is taken again (arXiv:2506.09045).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cmlora.errors import CmloraError

_USAGE = "mag, mag:0.06 or mag:0.06:1.0,1.2,1.1"


@dataclass(frozen=True)
class Mag:
    """What a text says of a MagCache.

    Args:
        threshold: how far the accumulated ratios may be from 1, in sum.
        ratios: the table, one number per step of the run that it was measured in; empty for the
            one that diffusers has for FLUX.1.

    Raises:
        CmloraError: for numbers that make no sense.
    """

    threshold: float = 0.06
    ratios: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise CmloraError(f"cache mag: threshold {self.threshold} is not 0 or more")
        if not all(math.isfinite(ratio) and ratio > 0 for ratio in self.ratios):
            raise CmloraError("cache mag: a ratio of lengths is not a number above 0")

    @property
    def text(self) -> str:
        """What `parse` understands."""
        listed = ",".join(f"{ratio:.5g}" for ratio in self.ratios)
        return f"mag:{self.threshold!r}" + (f":{listed}" if listed else "")

    def config(self, model: Any, steps: int) -> Any:
        """diffusers' configuration for a run.

        Args:
            model: the denoiser.
            steps: of the run; the table is stretched to them.

        Raises:
            CmloraError: if there is no table for this model.
        """
        from diffusers.hooks import MagCacheConfig
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

        ratios: Sequence[float] = self.ratios
        if not ratios:
            model = getattr(model, "_orig_mod", model)
            if not any(c.__name__ == "FluxTransformer2DModel" for c in type(model).__mro__):
                raise CmloraError(
                    f"cache mag has no table for {type(model).__name__}, only for FLUX.1; measure "
                    "one with cmlora.pipelines.magnitudes.measure(pipe, call) and give the text "
                    "that it returns as cache"
                )
            ratios = FLUX_MAG_RATIOS.tolist()
        return MagCacheConfig(
            threshold=self.threshold, num_inference_steps=max(1, steps), mag_ratios=list(ratios)
        )


def parse(text: str) -> Mag | None:
    """What a text means, or ``None`` if it means another cache.

    Args:
        text: ``mag``, with a threshold and a table if wanted, each behind a colon.

    Raises:
        CmloraError: if what follows the name are no such numbers.

    >>> parse("mag:0.1:1.0,1.25").ratios
    (1.0, 1.25)
    """
    name, *rest = (part.strip() for part in text.split(":"))
    if name != "mag":
        return None
    try:
        if len(rest) > 2:
            raise ValueError
        threshold = float(rest[0]) if rest else Mag.threshold
        table = tuple(float(number) for number in rest[1].split(",")) if rest[1:] else ()
    except ValueError:
        raise CmloraError(f"cache {text!r}: write {_USAGE}") from None
    return Mag(threshold, table)
