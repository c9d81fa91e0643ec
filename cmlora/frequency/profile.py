"""The frequency profile of a LoRA on a base model: measured once, kept beside its file.

What is measured is the LoRA's own contribution at the same state of the same run,
delta(t) = x0_LoRA - x0_base, with x0 the picture each of the two predicts from the noisy latent
x_t. The run is driven by the LoRA's prediction. Per step the profile holds the high-frequency share
R_h(delta) (`cmlora.frequency.spectrum.energy_ratio`) and the size |delta| / |x0_base|.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cmlora import denoisers
from cmlora.caching.policy import none
from cmlora.errors import CmloraError
from cmlora.frequency.card import Profile, StaleCard, card_path, read_card, write_card
from cmlora.frequency.prediction import predicted_original
from cmlora.plan import Member, Pass, Plan, Policy, Step

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "Profile",
    "StaleCard",
    "base_id",
    "card_path",
    "measure",
    "read_card",
    "write_card",
]

SPLIT = 0.2
"""h: the relative radius at which high frequencies begin."""


def measure(
    pipe: Any,
    name: str,
    prompts: Sequence[str],
    *,
    steps: int = 30,
    seeds: Iterable[int] = (0,),
    guidance_scale: float | None = None,
    split: float = SPLIT,
    **call: Any,
) -> Profile:
    """Run a LoRA alone beside its base model and measure what it adds.

    Every prompt is rendered from every seed, two passes a step, without decoding; the profile is
    the mean over them. Afterwards the pipeline is as it was.

    Args:
        pipe: a diffusers pipeline with the LoRA loaded.
        name: the LoRA's adapter name; its strength is the one of its file.
        prompts: texts that make the LoRA act, with its trigger words.
        steps: denoising steps.
        seeds: of the initial noise.
        guidance_scale: as in the pipeline's call; ``None`` is the pipeline's own default.
        split: h, see `cmlora.frequency.spectrum.energy_ratio`.
        call: further arguments of the pipeline's call (height, width, ...).

    Raises:
        CmloraError: for a pipeline without denoiser, an unknown LoRA, nothing to render, a
            scheduler or latents that cannot be measured, and a composed pipeline.
    """
    import torch

    seeds = tuple(seeds)
    if isinstance(prompts, str) or not prompts or not seeds or steps < 1:
        raise CmloraError(
            f"profile of {name}: needs a list of prompts, seeds and 1 step or more; "
            f"got {prompts!r}, {seeds!r} and {steps}"
        )
    probe = _Probe(name, pipe.scheduler, split)
    if guidance_scale is not None:
        call["guidance_scale"] = guidance_scale
    with _attached(pipe, name, probe):
        for prompt in prompts:
            for seed in seeds:
                pipe(
                    prompt,
                    num_inference_steps=steps,
                    generator=torch.Generator().manual_seed(seed),
                    output_type="latent",
                    **call,
                )
    return probe.profile(base_id(pipe))


def base_id(pipe: Any) -> str:
    """A short name for a base model's weights: 16 hex digits.

    A digest of the denoiser's one-dimensional parameters (norms and biases), which any further
    training changes, LoRAs do not, and which are quick to read. The dtype counts: a model loaded
    in half precision has another id.
    """
    digest = hashlib.sha256()
    plain = {
        key.replace(".base_layer.", "."): parameter
        for key, parameter in _denoiser(pipe).named_parameters()
        if parameter.ndim == 1 and "lora_" not in key
    }
    for key in sorted(plain):
        values = plain[key].detach().float().cpu().contiguous()
        digest.update(f"{key} {tuple(values.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


class _Probe:
    """A strategy that runs base model and LoRA at every step and keeps what it measures."""

    def __init__(self, name: str, scheduler: Any, split: float) -> None:
        self._name = name
        self._scheduler = scheduler
        self._split = split
        self._readings: dict[float, list[tuple[float, float]]] = {}

    def __call__(
        self, step: Step, members: Sequence[Member], policy: Policy, *args: Any, **options: Any
    ) -> Plan:
        """Base and LoRA, all of the LoRA's output; members and policy make no difference."""

        def observe(sample: Tensor, outputs: Tensor) -> Mapping[str, float]:
            reading = self._measure(step.timestep, sample, outputs)
            self._readings.setdefault(step.fraction, []).append(reading)
            return {}

        return Plan((Pass({}), Pass({self._name: 1.0})), (0.0, 1.0), observe)

    def profile(self, base: str) -> Profile:
        """Means over all runs."""
        rows = sorted(self._readings.items())
        return Profile(
            lora="",
            base=base,
            fractions=tuple(fraction for fraction, _ in rows),
            ratio=tuple(fmean(ratio for ratio, _ in readings) for _, readings in rows),
            norm=tuple(fmean(norm for _, norm in readings) for _, readings in rows),
        )

    def _measure(self, timestep: float, sample: Tensor, outputs: Tensor) -> tuple[float, float]:
        """Share and size, the mean over the batch (guidance's halves among it)."""
        from cmlora.frequency.spectrum import energy_ratio

        if outputs.ndim != 5:
            raise CmloraError(
                f"profile of {self._name}: the denoiser's output {tuple(outputs.shape[1:])} is no "
                "batch of maps (B, C, H, W), so it has no spatial frequencies"
            )
        noisy = sample[:, : outputs.shape[2]].float()
        base, ours = (
            predicted_original(self._scheduler, noisy, output.float(), timestep)
            for output in outputs
        )
        delta = ours - base
        size = delta.flatten(1).norm(dim=1) / base.flatten(1).norm(dim=1).clamp_min(1e-12)
        return float(energy_ratio(delta, self._split).mean()), float(size.mean())


def _attached(pipe: Any, name: str, probe: _Probe) -> ExitStack:
    """The probe on the pipeline's denoisers, until the stack is closed."""
    from torch import nn

    from cmlora.engine import HOOK, CompositionHook
    from cmlora.hooks import Attachment, forget_children, hook_of
    from cmlora.run import Run
    from cmlora.switching import AdapterSwitch
    from cmlora.tracker import StepTracker

    models = denoisers.find(pipe)
    if any(hook_of(model, HOOK) is not None for model in models.values()):
        raise CmloraError(f"profile of {name}: leave the composition in this pipeline first")
    encoders = [getattr(pipe, attribute, None) for attribute in denoisers.TEXT_ENCODERS]
    switches = [AdapterSwitch(model) for model in models.values()]
    text = [AdapterSwitch(encoder) for encoder in encoders if isinstance(encoder, nn.Module)]
    loaded = sorted({each for s in (*switches, *text) for each in s.names})
    if name not in loaded:
        listed = ", ".join(loaded) or "none"
        raise CmloraError(f"profile: no LoRA {name!r} in the pipeline; loaded: {listed}")

    def speak() -> None:
        for each in text:
            each.activate({name: 1.0})

    tracker = StepTracker(pipe)
    run = Run(probe, [Member(name)], none(), tracker=tracker, method="profile", prepare=speak)
    with ExitStack() as stack:
        for each in (*switches, *text):
            stack.callback(each.restore, each.snapshot())
            each.freeze()
        for model, switch in zip(models.values(), switches, strict=True):
            stack.callback(forget_children, model)
            hook = CompositionHook(run, switch=switch)
            stack.callback(Attachment(model, hook, HOOK).remove)
            forget_children(model)
        speak()
        return stack.pop_all()


def _denoiser(pipe: Any) -> nn.Module:
    """The denoiser that stands for a base model: the first of the pipeline's."""
    return next(iter(denoisers.find(pipe).values()))
