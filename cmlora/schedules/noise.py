"""The noise level of a step, as its scheduler counts it."""

from __future__ import annotations

from typing import Any

from cmlora.frequency.prediction import noise_level


def sigma_at(scheduler: Any, timestep: float) -> float | None:
    """Sigma of a timestep, or ``None`` if the scheduler has no noise levels.

    That of ``scheduler.sigmas`` where there is such a table: 0 to 1 for flow matching, up to about
    14 for Stable Diffusion. Of schedulers with cumulated alphas alone, such as DDIM, it is
    sqrt((1 - a) / a), which is the same scale.

    Args:
        scheduler: a diffusers scheduler whose timesteps are set.
        timestep: the value it has at the step.
    """
    sigmas, timesteps = getattr(scheduler, "sigmas", None), getattr(scheduler, "timesteps", None)
    if sigmas is not None and timesteps is not None and len(sigmas) >= len(timesteps):
        places = [i for i, value in enumerate(timesteps.tolist()) if value == timestep]
        if places:
            return float(sigmas[places[0]])
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        alpha, sigma = noise_level(scheduler.alphas_cumprod, timestep)
        return sigma / alpha
    return None
