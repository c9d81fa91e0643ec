"""Objectives on a pipeline: what a merged LoRA should answer, asked at fixed noise."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cmlora.adapters.applied import applied
from cmlora.adapters.objective import Answers, Question, answer
from cmlora.errors import CmloraError
from cmlora.lora import DENOISERS, LoRA
from cmlora.pipelines.calibrate import parts
from cmlora.pipelines.cmlora_pipeline import CMLoRAPipeline
from cmlora.pipelines.coefficients import Score
from cmlora.pipelines.models import EMBEDDED
from cmlora.pipelines.questions import SPREAD, strided
from cmlora.switching import AdapterSwitch

STEPS = 4


def distill(
    pipe: CMLoRAPipeline,
    loras: Sequence[LoRA],
    *,
    prompts: Mapping[str, Sequence[str]] | None = None,
    steps: int = STEPS,
    spread: int = SPREAD,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
    **arguments: Any,
) -> Answers:
    """Every LoRA's own answers, at its own prompts, along its own way through the noise.

    The error of a question is divided by how far the LoRA moves the answer of the model alone, so
    that the model alone has loss 1.

    Args:
        pipe: the model, with no LoRA active.
        loras: with different names, at the strength they are wanted at.
        prompts: by LoRA; the first trigger word of those that are missing.
        steps: denoising steps per prompt that are kept, each of which is a question.
        spread: so many times as many steps are made, and every prompt keeps other ones.
        seed: of the initial noise.
        advance: called after every LoRA.
        arguments: for the pipeline's call, such as ``guidance_scale``.

    Raises:
        CmloraError: if a LoRA has no prompt, does not fit the model, or changes no answer.
    """
    component, denoiser = denoiser_of(pipe)
    questions: list[Question] = []
    phase = 0
    for lora in loras:
        texts = (prompts or {}).get(lora.name) or lora.triggers[:1]
        if not texts:
            raise CmloraError(f"no prompt for {lora.name}, whose file names no trigger words")
        for text in texts:
            with active(pipe, lora), recording(denoiser) as calls:
                draw(pipe, text, steps * spread, seed, **arguments)
            kept = strided(calls, steps, spread, phase)
            phase += 1
            for call, wanted in kept:
                with torch.no_grad():
                    alone = answer(denoiser, call)
                size = float((wanted - alone).square().mean())
                if size > 0:
                    questions.append(Question(call, wanted, size, lora.name))
        if not any(question.asks == lora.name for question in questions):
            raise CmloraError(f"{lora.name} changes no answer of this model to {texts[0]!r}")
        advance()
    return Answers(denoiser, component, questions)


def denoise_mse(
    pipe: CMLoRAPipeline,
    pictures: Sequence[Image.Image],
    prompt: str,
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> Answers:
    """The denoising loss of training on a few pictures, at fixed noise and timesteps.

    Args:
        pipe: the model, with no LoRA active; it has an autoencoder and one prediction type.
        pictures: what the merged LoRA should draw; brought to the model's size.
        prompt: for all of them.
        steps: timesteps per picture, spread over the schedule; every picture has other ones.
        seed: of the noise.

    Raises:
        CmloraError: if there is no picture, or the model's scheduler has no noise to add.
    """
    component, denoiser = denoiser_of(pipe)
    if not pictures:
        raise CmloraError("a denoising loss needs a picture")
    scheduler = pipe.pipe.scheduler
    if not hasattr(scheduler, "alphas_cumprod"):
        raise CmloraError(f"no denoising loss for a {type(scheduler).__name__}; use distill")
    with recording(denoiser) as calls:
        draw(pipe, prompt, 1, seed, guidance_scale=1.0)
    template = calls[0][0]
    sample = template["sample"]
    generator = torch.Generator().manual_seed(seed)
    questions = []
    count = len(scheduler.alphas_cumprod)
    for place, picture in enumerate(pictures):
        clean = encoded(pipe.pipe, picture, tuple(sample.shape[-2:]))
        offset = (place + 0.5) / len(pictures)
        for index in range(steps):
            timestep = torch.tensor([int((index + offset) / steps * count)])
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            alpha = scheduler.alphas_cumprod[timestep].to(clean)
            noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
            kind = scheduler.config.prediction_type
            wanted = {
                "epsilon": noise,
                "sample": clean,
                "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,
            }[kind]
            asked = {**template, "sample": noisy.to(sample), "timestep": timestep[0]}
            questions.append(Question(asked, wanted.float()))
    return Answers(denoiser, component, questions)


@dataclass(frozen=True)
class Scored:
    """How badly pictures with a LoRA are judged: only for methods that search.

    Args:
        pipe: the model, with no LoRA active.
        component: the denoiser's name.
        prompt: of all pictures.
        score: more is better.
        seeds: one picture each; the same for every LoRA.
        steps: denoising steps.
        arguments: for the pipeline's call.
    """

    pipe: CMLoRAPipeline
    component: str
    prompt: str
    score: Score
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 8
    arguments: Mapping[str, Any] = field(default_factory=dict)
    differentiable: bool = False

    def loss(self, lora: LoRA | None) -> Tensor:
        """The negative mean score."""
        pictures = []
        with active(self.pipe, LoRA("none", {}) if lora is None else lora), torch.no_grad():
            for seed in self.seeds:
                output = self.pipe.pipe(
                    self.prompt,
                    num_inference_steps=self.steps,
                    generator=torch.Generator("cpu").manual_seed(seed),
                    **self.arguments,
                )
                pictures += output.images
        marks = self.score(pictures, [self.prompt] * len(pictures))
        return -torch.tensor([float(mark) for mark in marks]).mean()

    def value(self, lora: LoRA | None) -> float:
        """The same as a number."""
        return float(self.loss(lora))


def clip_score(pipe: CMLoRAPipeline, prompt: str, **arguments: Any) -> Scored:
    """CLIPScore of a few pictures, with the CLIP that comes with the embedded model.

    Raises:
        CmloraError: for another model, which has no judge of its own.
    """
    if str(pipe.ensemble.source) != EMBEDDED:
        raise CmloraError("clip_score needs the embedded model's CLIP; use distill or denoise_mse")
    from cmlora.emoji.clip import score

    return Scored(pipe, denoiser_of(pipe)[0], prompt, score, arguments=arguments)


@torch.no_grad()
def encoded(pipe: Any, picture: Image.Image, size: tuple[int, ...]) -> Tensor:
    """The latent (1, C, H, W) of a picture, scaled as the denoiser knows it."""
    vae = pipe.vae
    pixels = pipe.image_processor.preprocess(
        picture.convert("RGB"),
        height=size[0] * pipe.vae_scale_factor,
        width=size[1] * pipe.vae_scale_factor,
    )
    latent: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scaled_latent: Tensor = (latent - shift) * vae.config.scaling_factor
    return scaled_latent


@contextmanager
def active(pipe: CMLoRAPipeline, lora: LoRA) -> Iterator[None]:
    """A LoRA on all models of a pipeline, without being loaded into it."""
    models = parts(pipe.pipe)
    with ExitStack() as stack:
        for part, updates in lora.parts.items():
            if part in models:
                own = {_own(models[part], module): update for module, update in updates.items()}
                stack.enter_context(applied(models[part], own))
        yield


@contextmanager
def silent(pipe: CMLoRAPipeline) -> Iterator[None]:
    """No loaded LoRA acts; afterwards those act that acted before."""
    switches = [AdapterSwitch(model) for model in parts(pipe.pipe).values()]
    before = [switch.snapshot() for switch in switches]
    try:
        for switch in switches:
            switch.freeze()
            switch.activate({})
        yield
    finally:
        for switch, state in zip(switches, before, strict=True):
            switch.restore(state)


@contextmanager
def recording(denoiser: nn.Module) -> Iterator[list[tuple[dict[str, Any], Tensor]]]:
    """The arguments and answers of every call of a denoiser.

    A composition's passes are not calls of their own: what is recorded is what comes out of it.
    """
    calls: list[tuple[dict[str, Any], Tensor]] = []
    names = _positions(denoiser)

    def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output.sample
        call = dict(zip(names, given, strict=False)) | named
        calls.append((_copied(call), first.detach().float().clone()))

    handle = denoiser.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def draw(pipe: CMLoRAPipeline, text: str, steps: int, seed: int, **arguments: Any) -> None:
    """A run of the plain pipeline to its last latent."""
    noise = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        pipe.pipe(
            text, num_inference_steps=steps, generator=noise, output_type="latent", **arguments
        )


def scaled(lora: LoRA, weight: float) -> LoRA:
    """The LoRA at a strength."""
    updates = {m: replace(u, scale=u.scale * weight) for m, u in lora.updates.items()}
    return replace(lora, updates=updates)


def denoiser_of(pipe: CMLoRAPipeline) -> tuple[str, nn.Module]:
    """The name of a pipeline's denoiser, and the denoiser with its weights frozen."""
    models = parts(pipe.pipe)
    for name in DENOISERS:
        if name in models:
            return name, models[name].requires_grad_(False)
    raise CmloraError(f"{type(pipe.pipe).__name__} has no denoiser")


def _own(model: nn.Module, module: str) -> str:
    return module if hasattr(model, "text_model") else module.removeprefix("text_model.")


def _positions(denoiser: nn.Module) -> list[str]:
    import inspect

    return list(inspect.signature(type(denoiser).forward).parameters)[1:]


def _copied(value: Any) -> Any:
    """Arguments as they were, whatever the pipeline does with its tensors later."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value
