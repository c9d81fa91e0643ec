"""The training loop: any tuner, or the denoiser itself, in any text-to-image pipeline.

Everything random in a step follows from the seed and the step's number, so that a training that
was interrupted and resumed ends with the same bits.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmlora.adapters.training import checkpoint, result
from cmlora.adapters.training.average import Average
from cmlora.adapters.training.buckets import Order, sizes
from cmlora.adapters.training.conditioning import Conditioning, denoiser_of, unwrapped
from cmlora.adapters.training.gradients import Reduced, Scaled, estimate
from cmlora.adapters.training.hooks import Gradients, hooks_of
from cmlora.adapters.training.inputs import Latents, Texts
from cmlora.adapters.training.interrupt import deferred
from cmlora.adapters.training.log import Log
from cmlora.adapters.training.objective import Flow, objective_of
from cmlora.adapters.training.optim import make
from cmlora.adapters.training.parts import Parts
from cmlora.adapters.training.pictures import Example
from cmlora.adapters.training.samples import draw
from cmlora.adapters.training.settings import Settings
from cmlora.errors import CmloraError

Progress = Callable[[int, float], None]
"""Called after each step with the number of steps done and the loss."""


@dataclass(frozen=True)
class Outcome:
    """What a training made.

    Args:
        path: the adapter's file, or the folder of the denoiser that was trained itself.
        losses: of every step.
        trained: how many numbers were trained.
    """

    path: Path
    losses: tuple[float, ...]
    trained: int


class Trainer:
    """A training that is ready to run; making it puts the adapters into the pipeline.

    Args:
        pipe: a text-to-image pipeline, or a wrapper with one as its attribute ``pipe``; its models
            are changed. One process trains where they are, each of several on a device of its own.
        settings: of the training.
        examples: the pictures.
        prior: pictures of the class, if their loss is added.

    Raises:
        CmloraError: if the settings do not fit the pipeline or the pictures.
    """

    def __init__(
        self,
        pipe: Any,
        settings: Settings,
        examples: Sequence[Example],
        prior: Sequence[Example] = (),
    ) -> None:
        pipe = unwrapped(pipe)
        self.pipe, self.settings = pipe, settings
        self.examples, self.prior_examples = list(examples), list(prior)
        if not examples:
            raise CmloraError("train: there are no pictures to train on")
        self.folder = Path(settings.output)
        self.reduced = Reduced(settings.precision)
        here = next(denoiser_of(pipe)[1].parameters()).device
        self.device = here if self.reduced.world == 1 else self.reduced.device
        self.scaled = Scaled(self.reduced.precision, self.device)
        self.pipe.to(self.device)
        self.objective = objective_of(
            pipe.scheduler,
            settings.objective,
            settings.min_snr,
            settings.noise_offset,
            settings.timesteps,
        )
        self.conditioning = Conditioning(pipe, settings.guidance)
        self.parts = Parts(pipe, settings)
        drawn = any(not isinstance(e.caption, str) for e in self.examples)
        text = not self.parts.models.keys() <= self.parts.denoisers.keys()
        self.texts = Texts(self.conditioning, text, settings.cache != "none" and not drawn)
        self.latents, self.order = self._pictures(self.examples, settings.seed)
        self.prior = self._pictures(self.prior_examples, settings.seed + 1) if prior else None
        self.hooks = hooks_of(self.parts)
        gradients = self._estimated()
        torch.manual_seed(settings.seed)  # PEFT starts its factors from the global stream
        with self.parts.or_removed():
            self.parts.insert()
            for hook in self.hooks:
                hook.begin(gradients, settings.rate)
            self.trained = self.parts.trained()
            self.optimizer = self._optimizer()
            self.average = Average(self.trained, settings.ema)
            if settings.checkpointing:
                self.parts.checkpoint_activations()
        self.step = 0

    @cached_property
    def digests(self) -> list[str]:
        """What changes with any picture or caption."""
        return [example.digest() for example in (*self.examples, *self.prior_examples)]

    @property
    def checkpoint(self) -> Path:
        """Where the state is kept."""
        return self.folder / "checkpoint.safetensors"

    def run(self, progress: Progress | None = None) -> Outcome:
        """Trains from the last checkpoint to the end, and writes the result.

        Args:
            progress: is told about every step.

        Raises:
            CmloraError: if the loss is no number any more, something cannot be written, or the
                checkpoint is of other settings.
        """
        settings = self.settings
        main = self.reduced.main
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CmloraError(f"cannot write to {self.folder}: {error.strerror}") from None
        self.resume()
        log = Log(self.folder, self.step, settings.tensorboard) if main else None
        self.parts.train(True)
        try:
            with torch.random.fork_rng(), deferred() as interrupt:
                while self.step < settings.steps:
                    began = time.monotonic()
                    loss, norm = self._one()
                    if log is not None:
                        log.add(
                            step=self.step,
                            epoch=self._epoch(self.step - 1),
                            loss=f"{loss:.9g}",
                            rate=f"{self._rate(self.step - 1):.6g}",
                            gradient=f"{norm:.6g}",
                            seconds=f"{time.monotonic() - began:.3f}",
                        )
                    last = self.step == settings.steps
                    due = last or self.step % settings.save_every == 0
                    if main and due:
                        self.save()
                    every = settings.validate_every
                    if main and every and self.step % every == 0:
                        self._validate()
                    if progress is not None:
                        progress(self.step, loss)
                    if interrupt.asked and not last:
                        if main and not due:
                            self.save()
                        raise KeyboardInterrupt
        finally:
            self.parts.train(False)
            if log is not None:
                log.plot()
                log.close()
        path = self._finish() if main else self.folder
        self.reduced.wait()
        losses = tuple(log.losses) if log is not None else ()
        return Outcome(path, losses, sum(p.numel() for p in self.trained.values()))

    def resume(self) -> None:
        """Takes up the checkpoint in the output folder, if there is one.

        Raises:
            CmloraError: if it is of other settings or pictures.
        """
        if not self.checkpoint.is_file():
            return
        checkpoint.restore(self, self.checkpoint)

    def save(self) -> None:
        """Writes a checkpoint; the one before stays until it is whole."""
        checkpoint.save(self, self.checkpoint)

    def loss(self, number: int, step: int) -> Tensor:
        """The loss of one batch.

        Args:
            number: of the batch; with the seed it decides pictures, captions, noise and timesteps.
            step: for hooks.
        """
        total = self._loss(self.latents, self.order, self.examples, number, 0)
        if self.prior is not None:
            prior = self._loss(*self.prior, self.prior_examples, number, 1)
            total = total + self.settings.prior_weight * prior
        for hook in self.hooks:
            penalty = hook.penalty()
            total = total if penalty is None else total + penalty.to(total)
        return total

    def _one(self) -> tuple[float, float]:
        """One step of the optimizer; returns the loss and the gradient's norm."""
        settings, step, world = self.settings, self.step, self.reduced.world
        first = step * settings.accumulate * world
        epoch = self._epoch(step)
        if step == 0 or epoch != self._epoch(step - 1):
            for hook in self.hooks:
                hook.epoch_start(epoch)
        seeds = np.random.default_rng((settings.seed, 2, step)).integers(2**62, size=2)
        torch.manual_seed(int(seeds[0]) + self.reduced.rank)  # dropout has no other source
        random = torch.Generator().manual_seed(int(seeds[1]))
        for hook in self.hooks:
            hook.before_forward(step, random)
        total = 0.0
        for part in range(settings.accumulate):
            number = first + part * world + self.reduced.rank
            with self.scaled.autocast():
                loss = self.loss(number, step) / settings.accumulate
            self.scaled.backward(loss)
            total += float(loss.detach())
        total = self.reduced.mean(total)
        if not math.isfinite(total):
            raise CmloraError(
                f"train: the loss is {total} at step {step + 1}; lower the rate, or use bf16 "
                "instead of fp16; the last checkpoint is kept"
            )
        if world > 1:  # processes whose batches reached other layers wait for each other
            for parameter in self.trained.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        self.reduced.average(gradients)
        self.scaled.unscale(self.optimizer)
        for hook in self.hooks:
            hook.after_backward(step)
        norm = torch.nn.utils.clip_grad_norm_(
            list(self.trained.values()), settings.clip or math.inf
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._factor(step)
        self.scaled.step(self.optimizer)
        self.optimizer.zero_grad()
        for hook in self.hooks:
            hook.after_step(step)
        if self.average.decay:
            self.average.update()
        self.step += 1
        return total, float(norm)

    def _loss(
        self,
        latents: Latents,
        order: Order,
        examples: Sequence[Example],
        number: int,
        stream: int,
    ) -> Tensor:
        size, rows = order.at(number)
        rng = np.random.default_rng((self.settings.seed, 3 + stream, number))
        texts = []
        for row in rows:
            empty = rng.random() < self.settings.caption_dropout
            text = examples[row % len(examples)].text(rng)
            texts.append("" if empty else text)
        random = torch.Generator().manual_seed(int(rng.integers(2**62)))
        clean = latents.get(rows).to(self.device)
        objective = self.objective
        if self.settings.timesteps == "shifted" and isinstance(objective, Flow):
            objective = replace(objective, shift=self.conditioning.shift(size))
        question = objective.ask(clean, random)
        arguments = self.texts.get(texts, size)
        dtype = self.scaled.input_dtype(self.parts.denoiser)
        found = self.conditioning.predict(question.noisy.to(dtype), question.timesteps, arguments)
        target = self.conditioning.prepared(question.target)
        errors = (found.float() - target.float()).square().flatten(1).mean(1)
        return (errors * question.weight.to(errors)).mean()

    def _pictures(self, examples: Sequence[Example], seed: int) -> tuple[Latents, Order]:
        settings = self.settings
        side = settings.resolution
        choices = sizes(side, settings.bucket_step) if settings.buckets else [(side, side)]
        cache = self.folder / "cache"
        found = Latents(self.pipe, examples, choices, settings.cache, cache, settings.flip)
        random = settings.order == "random"
        return found, Order(found.groups(), settings.batch, seed, random)

    def _estimated(self) -> Gradients:
        samples = max((hook.samples for hook in self.hooks), default=0)
        if not samples or self.checkpoint.is_file():  # what they led to is in the checkpoint
            return {}
        return estimate(self.parts.models, self.parts.layers, lambda i: self.loss(i, 0), samples)

    def _optimizer(self) -> torch.optim.Optimizer:
        settings, own_parts = self.settings, self.parts.denoisers
        asked = [groups for hook in self.hooks if (groups := hook.param_groups()) is not None]
        groups = asked[0] if asked else []
        if not asked:
            rates = {True: settings.rate, False: settings.text_rate}
            for own in (True, False):
                mine = {k: k.partition(".")[0] in own_parts for k in self.trained}
                found = [p for k, p in self.trained.items() if mine[k] == own]
                rate = rates[own] if rates[own] is not None else settings.rate
                if found:
                    groups.append({"params": found, "lr": rate})
        made = make(settings.optim, groups, settings.rate, settings.optim_options)
        for group in made.param_groups:
            group["initial_lr"] = group["lr"]
        return made

    def _factor(self, step: int) -> float:
        """What the learning rate is multiplied by at a step."""
        settings = self.settings
        rise = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
        share = step / settings.steps
        if settings.schedule == "linear":
            return rise * (1 - share)
        return (
            rise * (0.5 + 0.5 * math.cos(math.pi * share))
            if settings.schedule == "cosine"
            else rise
        )

    def _rate(self, step: int) -> float:
        return self.settings.rate * self._factor(step)

    def _epoch(self, step: int) -> int:
        return self.order.epoch(step * self.settings.accumulate * self.reduced.world)

    def _validate(self) -> None:
        self.parts.train(False)
        for hook in self.hooks:
            hook.settle()
        with self.average.applied():
            draw(self.pipe, self.settings, self.folder / "samples", self.step)
        self.parts.train(True)

    def _finish(self) -> Path:
        for hook in self.hooks:
            hook.settle()
        with self.average.applied():
            path = result.write(self.pipe, self.parts, self.settings, self.examples)
        if not self.settings.keep_checkpoint:
            self.checkpoint.unlink(missing_ok=True)
        return path


def train(
    pipe: Any,
    settings: Settings,
    examples: Sequence[Example],
    prior: Sequence[Example] = (),
    progress: Progress | None = None,
) -> Outcome:
    """Trains an adapter, or the denoiser, on pictures; continues where it was interrupted.

    Args:
        pipe: a text-to-image pipeline of diffusers, in which the adapter stays unless training
            fails; or a wrapper with one as its attribute ``pipe``, such as CMLoRAPipeline, which
            loads the file like any other.
        settings: of the training.
        examples: see `cmlora.adapters.training.pictures.read_folder`.
        prior: pictures of the class.
        progress: is told about every step.

    Returns:
        The file that was written, and the losses.

    Raises:
        CmloraError: for everything that a user can put right.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    with torch.random.fork_rng():
        try:
            trainer = Trainer(pipe, settings, examples, prior)
            with trainer.parts.or_removed():
                outcome = trainer.run(progress)
            if trainer.pipe is not pipe:  # a wrapper knows the LoRAs that it has loaded itself
                trainer.parts.remove()
            return outcome
        finally:
            pipe.scheduler = scheduler
