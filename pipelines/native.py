"""What a model was made for: the guidance scale and the size of its own pictures."""

import inspect
from typing import Any

from cmlora import denoisers
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.pipelines.models import EMBEDDED

_USUAL = 1024  # pixels, where a model does not say


def native_guidance(pipe: CMLoRAPipeline) -> float:
    """The guidance scale a model is used with unless told otherwise."""
    if str(pipe.ensemble.source) == EMBEDDED:
        from cmlora.emoji.weights import GUIDANCE

        return GUIDANCE
    model = next(iter(denoisers.find(pipe.pipe).values()))
    own = inspect.signature(pipe.pipe.__call__).parameters.get(denoisers.kind(model).guidance)
    stated = own is not None and isinstance(own.default, float) and not hasattr(pipe.pipe, "unet")
    return own.default if own is not None and stated else 7.5


def native_size(pipe: Any) -> tuple[int, int]:
    """Width and height in pixels that a model was made for."""
    denoiser: Any = next(iter(denoisers.find(pipe).values()))
    side = denoiser.config.get("sample_size") or getattr(pipe, "default_sample_size", None)
    side = side or _USUAL // pipe.vae_scale_factor
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return width * pipe.vae_scale_factor, height * pipe.vae_scale_factor
