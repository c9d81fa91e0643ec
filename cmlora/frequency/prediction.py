"""The picture a denoiser predicts, x0, from what it puts out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from cmlora.errors import CmloraError

if TYPE_CHECKING:
    from torch import Tensor


def predicted_original(scheduler: Any, noisy: Tensor, output: Tensor, timestep: float) -> Tensor:
    """x0 of a denoiser's output, for every prediction type.

    With x_t = alpha x0 + sigma noise and alpha^2 + sigma^2 = 1: (x_t - sigma output) / alpha for
    ``epsilon``, alpha x_t - sigma output for ``v_prediction``, the output for ``sample``. With
    x_t = (1 - sigma) x0 + sigma noise (flow matching): x_t - sigma output.

    Args:
        scheduler: a diffusers scheduler.
        noisy: x_t as the denoiser sees it, (B, C, H, W).
        output: what it puts out, (B, C, H, W).
        timestep: the scheduler's value.

    Raises:
        CmloraError: for a scheduler without noise levels, or another prediction type.
    """
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if kind == "flow_prediction":
        sigma = timestep / float(scheduler.config.num_train_timesteps)
        return noisy - sigma * output
    if kind == "sample":
        return output
    if kind in ("epsilon", "v_prediction") and hasattr(scheduler, "alphas_cumprod"):
        alpha, sigma = noise_level(scheduler.alphas_cumprod, timestep)
        if kind == "epsilon":
            return (noisy - sigma * output) / alpha
        return alpha * noisy - sigma * output
    raise CmloraError(
        f"{type(scheduler).__name__} with prediction type {kind!r} gives no predicted picture; "
        "expected epsilon, v_prediction, sample or flow_prediction"
    )


def noise_level(alphas_cumprod: Tensor, timestep: float) -> tuple[float, float]:
    """(alpha, sigma) at a timestep; between two of them sigma / alpha is interpolated."""
    last = len(alphas_cumprod) - 1
    below = min(max(math.floor(timestep), 0), last)
    above = min(below + 1, last)
    # rescaled schedules end at alpha = 0
    levels = [max(float(alphas_cumprod[i]), 1e-8) for i in (below, above)]
    low, high = (math.sqrt((1 - level) / level) for level in levels)
    part = min(max(timestep - below, 0.0), 1.0)
    ratio = low + part * (high - low)
    alpha = 1 / math.sqrt(1 + ratio * ratio)
    return alpha, ratio * alpha
