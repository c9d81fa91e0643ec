"""What a model was made for: its guidance scale, the size of its pictures, how its passes run."""

import inspect
from typing import Any, Literal

import torch

from cmlora import denoisers
from cmlora.fusing import copied, resident
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.pipelines.models import EMBEDDED

_USUAL = 1024  # pixels, where a model does not say
_COPIES = 2**28  # bytes of weights that nobody misses
_SMALL = 2**27  # bytes of weights


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
    factor = _factor(pipe)
    side = denoiser.config.get("sample_size") or getattr(pipe, "default_sample_size", None)
    call = inspect.signature(pipe.__call__).parameters
    stated = [call[name].default for name in ("width", "height") if name in call]
    if not side and len(stated) == 2 and all(isinstance(length, int) for length in stated):
        return stated[0], stated[1]
    side = side or _USUAL // factor
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return width * factor, height * factor


def native_execution(pipe: CMLoRAPipeline) -> Literal["sequential", "fused"]:
    """How passes run best: with LoRAs fused into copies of a small model's weights, else beside."""
    models = denoisers.find(pipe.pipe).values()
    copies = sum(map(copied, models)) * (len(pipe.loras) + 1)
    return "fused" if 0 < copies <= _COPIES and all(map(resident, models)) else "sequential"


def native_threads(pipe: CMLoRAPipeline) -> int:
    """Processor threads for a picture beside other work; 0 for as many as there are.

    The passes of a small model are so short that its last thread gains nothing while the other
    work waits for it.
    """
    if pipe.device.type != "cpu":
        return 0
    weights = sum(
        parameter.numel() * parameter.element_size()
        for model in denoisers.find(pipe.pipe).values()
        for parameter in model.parameters()
    )
    return max(1, torch.get_num_threads() - 1) if weights <= _SMALL else 0


def unit(pipe: Any) -> int:
    """Pixels of which a picture's sides must be multiples."""
    patched = denoisers.kind(next(iter(denoisers.find(pipe).values()))).latent == "frames"
    return max(8, _factor(pipe)) * (2 if patched else 1)


def _factor(pipe: Any) -> int:
    """Pixels per number of a latent, on a side."""
    own = getattr(pipe, "vae_scale_factor", None)
    return int(own if own is not None else getattr(pipe, "vae_scale_factor_spatial", 8))
