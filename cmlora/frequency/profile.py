"""The frequency profile of a LoRA on a base model: measured once, kept beside its file.

What is measured is the LoRA's own contribution at the same state of the same run,
delta(t) = x0_LoRA - x0_base, with x0 the picture each of the two predicts from the noisy latent
x_t. The run is driven by the LoRA's prediction. Per step the profile holds the high-frequency share
R_h(delta) (`cmlora.frequency.spectrum.energy_ratio`) and the size |delta| / |x0_base|.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cmlora.caching.policy import none
from cmlora.container import replacing, sha256
from cmlora.errors import CmloraError
from cmlora.frequency.prediction import predicted_original
from cmlora.plan import Member, Pass, Plan, Policy, Step

if TYPE_CHECKING:
    from torch import Tensor, nn

SPLIT = 0.2
"""h: the relative radius at which high frequencies begin."""

_DENOISERS = ("unet", "transformer")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class StaleCard(UserWarning):
    """A profile card that belongs to another file or base model, or cannot be read."""


@dataclass(frozen=True)
class Profile:
    """What a LoRA contributes in the course of a run on one base model.

    Args:
        lora: SHA-256 of the LoRA's file; empty as long as no card is written.
        base: `base_id` of the model it was measured on.
        fractions: where in the run each step is, 0 to 1, ascending.
        ratio: high-frequency share of the contribution at each step, 0 to 1.
        norm: size of the contribution at each step, relative to the base's predicted picture.

    Raises:
        ValueError: if there is no step, or the rows differ in length.
    """

    lora: str
    base: str
    fractions: tuple[float, ...]
    ratio: tuple[float, ...]
    norm: tuple[float, ...]

    def __post_init__(self) -> None:
        lengths = {len(self.fractions), len(self.ratio), len(self.norm)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"a profile needs rows of one length and a step; it has {lengths}")

    @property
    def frequency(self) -> float:
        """Mean high-frequency share over the steps with a contribution; NaN if there is none."""
        shares = [r for r, size in zip(self.ratio, self.norm, strict=True) if size > 0]
        return fmean(shares) if shares else math.nan

    @property
    def window(self) -> tuple[float, float]:
        """The shortest part of the run that holds at least half of the contribution's size.

        Of equally short parts the one that holds most; the whole run if nothing is contributed.
        """
        edges = (*self.fractions, 1.0)
        whole = math.fsum(self.norm)
        if whole == 0:
            return edges[0], 1.0
        parts = []
        for first in range(len(self.norm)):
            for last in range(first + 1, len(edges)):
                held = math.fsum(self.norm[first:last])
                if held >= whole / 2:
                    # differences of fractions that are equal may differ in the last digit
                    length = round(edges[last] - edges[first], 9)
                    parts.append((length, -held, first, last))
        _, _, first, last = min(parts)
        return edges[first], edges[last]


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


def card_path(path: str | os.PathLike[str]) -> Path:
    """Where the card of a LoRA's file is: ``<file>.profile.json`` beside it."""
    return Path(f"{os.fspath(path)}.profile.json")


def write_card(path: str | os.PathLike[str], profile: Profile) -> Path:
    """Keep a profile beside its LoRA's file, which must be there.

    A card holds one profile per base model; those of another version of the file are dropped.

    Returns:
        The card's path.

    Raises:
        CmloraError: if the LoRA's file cannot be read or the card cannot be written.
    """
    digest, target = sha256(path), card_path(path)
    try:
        before = _parse(target) if target.exists() else {}
    except ValueError:
        before = {}
    kept = {base: card for base, card in before.items() if card.lora == digest}
    kept.pop(profile.base, None)
    kept[profile.base] = replace(profile, lora=digest)
    rows = {"format": 1, "profiles": [asdict(card) for card in kept.values()]}
    with replacing(target) as file:
        file.write((json.dumps(rows, indent=1) + "\n").encode())
    return target


def read_card(path: str | os.PathLike[str], base: str | None = None) -> Profile | None:
    """The profile kept beside a LoRA's file, if it is one of this file and this base model.

    Args:
        path: the LoRA's file.
        base: `base_id` of the model in use; ``None`` takes the profile that was written last.

    Returns:
        The profile, or ``None`` if there is no card or it does not fit; then a `StaleCard`
        warning says why.

    Raises:
        CmloraError: if there is a card but the LoRA's file cannot be read.
    """
    card = card_path(path)
    if not card.exists():
        return None
    try:
        profiles = _parse(card)
    except ValueError as error:
        _warn(card, f"is not a profile card ({error})")
        return None
    digest = sha256(path)
    fitting = [profile for profile in profiles.values() if profile.lora == digest]
    if not fitting:
        _warn(card, "was measured with another version of the file")
        return None
    if base is None:
        return fitting[-1]
    for profile in fitting:
        if profile.base == base:
            return profile
    known = ", ".join(profile.base for profile in fitting)
    _warn(card, f"was measured on base model {known}, not on {base}")
    return None


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
    """The probe on the pipeline's denoiser, until the stack is closed."""
    from torch import nn

    from cmlora.engine import HOOK, CompositionHook
    from cmlora.hooks import Attachment, forget_children, hook_of
    from cmlora.switching import AdapterSwitch
    from cmlora.tracker import StepTracker

    denoiser = _denoiser(pipe)
    if hook_of(denoiser, HOOK) is not None:
        raise CmloraError(f"profile of {name}: leave the composition in this pipeline first")
    encoders = [getattr(pipe, attribute, None) for attribute in _TEXT_ENCODERS]
    switch = AdapterSwitch(denoiser)
    text = [AdapterSwitch(encoder) for encoder in encoders if isinstance(encoder, nn.Module)]
    loaded = sorted({each for s in (switch, *text) for each in s.names})
    if name not in loaded:
        listed = ", ".join(loaded) or "none"
        raise CmloraError(f"profile: no LoRA {name!r} in the pipeline; loaded: {listed}")

    def speak() -> None:
        for each in text:
            each.activate({name: 1.0})

    hook = CompositionHook(
        probe,
        [Member(name)],
        none(),
        switch=switch,
        tracker=StepTracker(pipe),
        method="profile",
        prepare=speak,
    )
    with ExitStack() as stack:
        for each in (switch, *text):
            stack.callback(each.restore, each.snapshot())
            each.freeze()
        stack.callback(forget_children, denoiser)
        stack.callback(Attachment(denoiser, hook, HOOK).remove)
        forget_children(denoiser)
        speak()
        return stack.pop_all()


def _denoiser(pipe: Any) -> nn.Module:
    for name in _DENOISERS:
        model: nn.Module | None = getattr(pipe, name, None)
        if model is not None:
            return model
    raise CmloraError(f"{type(pipe).__name__} has no {' or '.join(_DENOISERS)} to measure")


def _parse(card: Path) -> dict[str, Profile]:
    """The profiles of a card by base model, in the order they were written; ValueError if none."""
    try:
        rows = json.loads(card.read_text(encoding="utf-8"))["profiles"]
        profiles = [
            Profile(
                str(row["lora"]),
                str(row["base"]),
                *(tuple(map(float, row[key])) for key in ("fractions", "ratio", "norm")),
            )
            for row in rows
        ]
    except (KeyError, TypeError, OSError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not all(math.isfinite(v) for p in profiles for v in (*p.fractions, *p.ratio, *p.norm)):
        raise ValueError("a value is not finite")
    return {profile.base: profile for profile in profiles}


def _warn(card: Path, reason: str) -> None:
    warnings.warn(
        f"{card.name} {reason}; it is not used: measure again with cmlora profile",
        StaleCard,
        stacklevel=3,
    )
