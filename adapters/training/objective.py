"""What the denoiser is asked to predict, for diffusion and for flow models.

Shape letters: B batch, C channels, H and W of the latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmlora.errors import CmloraError

_KINDS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


class Question(NamedTuple):
    """One batch for the denoiser, and what it should answer.

    Args:
        noisy: (B, C, H, W).
        timesteps: (B,), 0 to 1000.
        target: (B, C, H, W).
        weight: (B,) of the squared errors.
    """

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Diffusion:
    """``x_t = sqrt(a_t) x + sqrt(1 - a_t) n`` with the noise, x or v as target.

    Args:
        alphas: (T,) cumulative products of the model's schedule.
        kind: "epsilon", "v" for ``sqrt(a) n - sqrt(1 - a) x`` (arXiv:2202.00512), or "sample".
        min_snr: gamma of arXiv:2303.09556, equations in section 3.4; 0 weighs all steps alike.
        noise_offset: standard deviation of what is added to a channel's noise as a whole.
        logit_normal: draw steps around the middle instead of uniformly.
    """

    alphas: Tensor
    kind: str
    min_snr: float = 0.0
    noise_offset: float = 0.0
    logit_normal: bool = False

    def ask(self, clean: Tensor, random: torch.Generator) -> Question:
        """A question about latents (B, C, H, W)."""
        noise = drawn(clean, random, self.noise_offset)
        count, batch = len(self.alphas), len(clean)
        if self.logit_normal:
            share = torch.randn(batch, generator=random).sigmoid()
            steps = (share * count).long().clamp(max=count - 1)
        else:
            steps = torch.randint(count, (batch,), generator=random)
        alphas = self.alphas[steps].to(clean.device)
        a = alphas[:, None, None, None]
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        if self.kind == "epsilon":
            target = noise
        elif self.kind == "v":
            target = a.sqrt() * noise - (1 - a).sqrt() * clean
        else:
            target = clean
        return Question(noisy, steps.to(clean.device), target, self.weight(alphas))

    def weight(self, alphas: Tensor) -> Tensor:
        """Weights (B,) of steps with these cumulative products."""
        if not self.min_snr:
            return torch.ones_like(alphas)
        snr = alphas / (1 - alphas)
        least = snr.clamp(max=self.min_snr)
        if self.kind == "sample":
            return least
        return least / (snr + 1 if self.kind == "v" else snr.clamp(min=1e-8))


@dataclass(frozen=True, eq=False)
class Flow:
    """``x_s = (1 - s) x + s n`` with ``n - x`` as target (arXiv:2209.03003).

    Args:
        shift: of the model's schedule: ``s`` becomes ``shift s / (1 + (shift - 1) s)``.
        noise_offset: see `Diffusion`.
        logit_normal: ``s`` is the sigmoid of a normal number (arXiv:2403.03206) or uniform.
    """

    shift: float = 1.0
    noise_offset: float = 0.0
    logit_normal: bool = True

    def ask(self, clean: Tensor, random: torch.Generator) -> Question:
        """A question about latents (B, C, H, W)."""
        noise = drawn(clean, random, self.noise_offset)
        if self.logit_normal:
            share = torch.randn(len(clean), generator=random).sigmoid()
        else:
            share = torch.rand(len(clean), generator=random)
        share = (self.shift * share / (1 + (self.shift - 1) * share)).to(clean)
        s = share[:, None, None, None]
        noisy = (1 - s) * clean + s * noise
        return Question(noisy, share * 1000, noise - clean, torch.ones_like(share))


def drawn(like: Tensor, random: torch.Generator, offset: float) -> Tensor:
    """Noise shaped like latents, the same on every device."""
    noise = torch.randn(like.shape, generator=random)
    if offset:
        noise = noise + offset * torch.randn(*like.shape[:2], 1, 1, generator=random)
    return noise.to(like)


def objective_of(
    scheduler: Any,
    kind: str = "auto",
    min_snr: float = 0.0,
    noise_offset: float = 0.0,
    timesteps: str = "auto",
) -> Diffusion | Flow:
    """The objective that a pipeline's scheduler belongs to.

    Args:
        scheduler: of diffusers.
        kind: "auto", or one that overrules it among those of its kind of model.
        min_snr: see `Diffusion`.
        noise_offset: see `Diffusion`.
        timesteps: "auto", "uniform", "logit_normal", or "shifted": uniform, then shifted as the
            pipeline shifts them, which the trainer asks it for.

    Raises:
        CmloraError: if the model and the kind or the weighting do not go together.
    """
    config = scheduler.config
    name = type(scheduler).__name__
    flows = "FlowMatch" in name or bool(config.get("use_flow_sigmas"))
    if flows or config.get("prediction_type") == "flow_prediction":
        if kind not in ("auto", "flow"):
            raise CmloraError(f"train: objective is {kind!r}, but {name} is of a flow model")
        if min_snr:
            raise CmloraError("train: min_snr is for diffusion models, and this is a flow model")
        # A shift that depends on the picture's size belongs to sampling.
        fixed = not config.get("use_dynamic_shifting")
        shift = (config.get("shift") or config.get("flow_shift") or 1.0) if fixed else 1.0
        return Flow(float(shift), noise_offset, timesteps in ("auto", "logit_normal"))
    if timesteps == "shifted":
        raise CmloraError("train: timesteps shifted is for flow models, and this is none")
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if kind == "flow" or alphas is None:
        raise CmloraError(f"train: {name} is not the scheduler of a flow or diffusion model")
    chosen = _KINDS[config.get("prediction_type", "epsilon")] if kind == "auto" else kind
    if config.get("rescale_betas_zero_snr") and chosen == "epsilon":
        raise CmloraError("train: with zero terminal SNR the noise says nothing; use objective v")
    return Diffusion(
        alphas.detach().float().cpu(), chosen, min_snr, noise_offset, timesteps == "logit_normal"
    )
