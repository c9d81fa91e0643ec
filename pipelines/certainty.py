"""An objective without any reference: a classifier should be sure what a picture shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cmlora.adapters.applied import applied
from cmlora.adapters.objective import answer
from cmlora.errors import CmloraError
from cmlora.lora import LoRA
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.pipelines.models import EMBEDDED
from cmlora.pipelines.objectives import STEPS, active, denoiser_of, draw, recording
from cmlora.pipelines.questions import SPREAD, strided


@dataclass(frozen=True)
class Certainty:
    """Mean entropy of CLIP's choice among texts, over the denoiser's guesses of clean pictures.

    Args:
        pipe: the model, with no LoRA active.
        model: its denoiser.
        component: the denoiser's name.
        calls: of the denoiser, arguments by name.
        texts: (C, D) unit vectors of the texts to choose from.
        sharpness: that cosines are multiplied with before they become chances.
        guidance: how the two halves of a call become one answer.
        differentiable: gradients flow through denoiser, decoder and classifier.
    """

    pipe: CMLoRAPipeline
    model: nn.Module
    component: str
    calls: Sequence[Mapping[str, Any]]
    texts: Tensor
    sharpness: float
    guidance: float
    differentiable: bool = True

    def loss(self, lora: LoRA | None) -> Tensor:
        """In units of the entropy of no idea: 0 is sure of one text, 1 knows nothing."""
        from cmlora.emoji import clip

        judge, _ = clip.load()
        updates = {} if lora is None else lora.parts.get(self.component, {})
        losses = []
        with applied(self.model, updates):
            for call in self.calls:
                seen = judge.encode_image(self._picture(call), normalize=True)
                chances = (self.sharpness * seen @ self.texts.T).log_softmax(1)
                losses.append(-(chances.exp() * chances).sum(1).mean())
        return torch.stack(losses).mean() / math.log(len(self.texts))

    def value(self, lora: LoRA | None) -> float:
        """The loss as a number."""
        with torch.no_grad():
            return float(self.loss(lora))

    def _picture(self, call: Mapping[str, Any]) -> Tensor:
        """The clean picture (B, 3, H, W), -1 to 1, that the answer to a noisy latent stands for."""
        output, noisy = answer(self.model, call), call["sample"].float()
        if self.guidance > 1:
            unconditional, conditional = output.chunk(2)
            output = unconditional + self.guidance * (conditional - unconditional)
            noisy = noisy.chunk(2)[1]
        scheduler, vae = self.pipe.pipe.scheduler, self.pipe.pipe.vae
        alpha = scheduler.alphas_cumprod[int(call["timestep"])].to(noisy)
        kind = scheduler.config.prediction_type
        if kind == "epsilon":
            output = (noisy - (1 - alpha).sqrt() * output) / alpha.sqrt()
        elif kind == "v_prediction":
            output = alpha.sqrt() * noisy - (1 - alpha).sqrt() * output
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        pixels: Tensor = vae.decode(output / vae.config.scaling_factor + shift).sample
        return pixels


def clip_entropy(
    pipe: CMLoRAPipeline,
    loras: Sequence[LoRA],
    *,
    prompts: Mapping[str, Sequence[str]] | None = None,
    steps: int = STEPS,
    spread: int = SPREAD,
    seed: int = 0,
    guidance_scale: float = 1.0,
) -> Certainty:
    """CLIP should be sure which LoRA's prompt a picture was drawn for.

    Every LoRA draws its own prompt along its own way through the noise; at every step the
    denoiser's guess of the clean picture is shown to the CLIP of the embedded model, which
    chooses among the prompts of all (the objective of arXiv:2312.06173 and of adaptive
    merging, arXiv:2310.02575). Nothing says that the sure choice is the right one.

    Args:
        pipe: the embedded model, with no LoRA active.
        loras: two or more with different prompts, at the strength they are wanted at.
        prompts: by LoRA; the first trigger word of those that are missing.
        steps: denoising steps per prompt that are kept.
        spread: so many times as many steps are made, and every prompt keeps other ones.
        seed: of the initial noise.
        guidance_scale: of the pictures.

    Raises:
        CmloraError: for another model, which has no judge of its own, for a LoRA without a prompt,
            or if there are not two prompts to tell apart.
    """
    if str(pipe.ensemble.source) != EMBEDDED:
        raise CmloraError("clip_entropy needs the embedded model's CLIP; use distill")
    from cmlora.emoji import clip

    component, denoiser = denoiser_of(pipe)
    asked: dict[str, LoRA] = {}
    for lora in loras:
        texts = (prompts or {}).get(lora.name) or lora.triggers[:1]
        if not texts:
            raise CmloraError(f"no prompt for {lora.name}, whose file names no trigger words")
        asked |= dict.fromkeys(texts, lora)
    if len(asked) < 2:
        raise CmloraError("clip_entropy tells prompts apart: give LoRAs with different ones")
    calls: list[Mapping[str, Any]] = []
    for phase, (text, lora) in enumerate(asked.items()):
        with active(pipe, lora), recording(denoiser) as found:
            draw(pipe, text, steps * spread, seed, guidance_scale=guidance_scale)
        calls += [call for call, _ in strided(found, steps, spread, phase)]
    judge, tokenizer = clip.load()
    judge.requires_grad_(False)
    pipe.pipe.vae.requires_grad_(False)
    words = tokenizer(list(asked), padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        said = judge.encode_text(words.input_ids, normalize=True)
    sharpness = float(judge.logit_scale.detach().exp())
    return Certainty(pipe, denoiser, component, calls, said, sharpness, guidance_scale)
