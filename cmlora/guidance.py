"""`MultiLoRAGuidance`: several LoRAs in diffusers' Modular pipelines, as a guider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance
from torch import nn

from cmlora.caching.policy import none
from cmlora.engine import HOOK, CompositionHook
from cmlora.errors import CmloraError
from cmlora.hooks import Attachment, forget_children, hook_of
from cmlora.members import check_loaded, described
from cmlora.relevance import weighs
from cmlora.run import Run
from cmlora.strategies import METHODS, check_options
from cmlora.strategies.auto import knowing
from cmlora.strategies.klora import weighed
from cmlora.switching import AdapterSwitch
from cmlora.tracker import Tick
from cmlora.updates import updates

_PREDICTIONS = ["pred_cond", "pred_uncond"]


class MultiLoRAGuidance(BaseGuidance):  # type: ignore[misc]
    """Composes LoRAs, and leaves guidance to another guider.

    A Modular pipeline asks its guider for the batches to run and hands the predictions back. This
    one gives it those of the inner guider, and has the engine on the denoiser while each is run,
    which carries the method out as under `cmlora.compose`. That works with Modular pipelines too
    and is the cheaper door, since it can reuse features; this one needs nothing but the place for a
    guider, and is saved with the pipeline. Features are not reused.

    Args:
        loras: adapter names, or adapter names with strengths, as a mapping or in pairs; they must
            be loaded in the denoiser.
        inner: the guider that does guidance, or its configuration; classifier-free guidance with
            diffusers' defaults if not given.
        method: name of a composition method.
        options: of the method.

    Raises:
        CmloraError: for an unknown method, option or inner guider, and for a method that goes by
            what a guider is not told.
    """

    _input_predictions = _PREDICTIONS

    def __init__(
        self,
        loras: Sequence[str] | Mapping[str, float] | Sequence[tuple[str, float]],
        inner: Any = None,
        method: str = "composite",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.inner = _guider(inner)
        self._members = described(_strengths(loras), None, {}, {})
        self._method = METHODS[method].name
        self._options = check_options(method, options or {})
        _check_told(method, self._options)
        self._where = _Told(self.inner)
        self._branches: list[str] = []
        self._denoiser: nn.Module | None = None
        self._attached = ExitStack()
        settings = {k: v for k, v in self.inner.config.items() if not k.startswith("_")}
        self.register_to_config(
            loras=[[member.name, member.weight] for member in self._members],
            inner={"_class_name": type(self.inner).__name__, **settings},
            method=method,
            options=dict(options or {}),
        )

    @property
    def guidance_scale(self) -> float:
        """Of the inner guider."""
        return float(self.inner.guidance_scale)

    @property
    def is_conditional(self) -> bool:
        """Whether the batch under way is the conditional one."""
        return bool(self.inner.is_conditional)

    @property
    def num_conditions(self) -> int:
        """How many predictions the inner guider combines."""
        return int(self.inner.num_conditions)

    def enable(self) -> None:
        """Switch guidance on."""
        super().enable()
        self.inner.enable()

    def disable(self) -> None:
        """Switch guidance off; LoRAs are composed all the same."""
        super().disable()
        self.inner.disable()

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Called by the pipeline before every step.

        Args:
            step: index of the step.
            num_inference_steps: how many there are.
            timestep: the scheduler's value.
        """
        super().set_state(step, num_inference_steps, timestep)
        self.inner.set_state(step, num_inference_steps, timestep)
        self._attached.close()
        self._where.arrive(step, num_inference_steps, timestep)

    def prepare_inputs(self, data: Any) -> list[Any]:
        """The batches of the inner guider."""
        return self._noted(self.inner.prepare_inputs(data))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        """The same for pipelines that name the fields of their state."""
        return self._noted(self.inner.prepare_inputs_from_block_state(data, input_fields))

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Called before every batch: puts the engine on the denoiser.

        Raises:
            CmloraError: if the LoRAs are not loaded in it, or are composed already.
        """
        if self._count_prepared >= len(self._branches):
            raise CmloraError("MultiLoRAGuidance: call set_state and prepare_inputs at every step")
        self._where.branch = self._branches[self._count_prepared]
        super().prepare_models(denoiser)
        self.inner.prepare_models(denoiser)
        if hook_of(denoiser, HOOK) is not None:
            raise CmloraError(
                "LoRAs are already composed in this denoiser; use cmlora.compose or this guider"
            )
        if self._denoiser is not denoiser:
            self._hook, self._switch = self._carrying_out(denoiser)
            self._denoiser = denoiser
        with ExitStack() as stack:
            stack.callback(self._switch.restore, self._switch.snapshot())
            self._switch.freeze()
            stack.callback(forget_children, denoiser)
            stack.callback(Attachment(denoiser, self._hook, HOOK).remove)
            forget_children(denoiser)
            self._attached = stack.pop_all()

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Called after every batch: the denoiser is as before."""
        self._attached.close()
        self.inner.cleanup_models(denoiser)

    def __call__(self, data: list[Any]) -> Any:
        """Guide.

        Args:
            data: the batches of `prepare_inputs`, in their order, with ``noise_pred``.
        """
        return self.inner(data)

    def _noted(self, batches: list[Any]) -> list[Any]:
        self._branches = [str(getattr(each, self._identifier_key, "")) for each in batches]
        return batches

    def _carrying_out(self, denoiser: nn.Module) -> tuple[CompositionHook, AdapterSwitch]:
        """The engine for a denoiser."""
        switch = AdapterSwitch(denoiser)
        check_loaded(self._members, [switch], needed=self._method != "naive")
        strategy, members = METHODS[self._method].object, self._members
        if self._method == "klora":
            members = weighed([denoiser], members)
        if self._method == "auto":
            strategy = knowing(updates([denoiser], [member.name for member in members]))
        self._where.reset()
        run = Run(
            strategy,
            members,
            none(),
            tracker=self._where,
            method=self._method,
            options=self._options,
        )
        # also when a call fails, after which nobody cleans up
        run.join(begin=lambda: None, end=lambda: self._attached.close())
        return CompositionHook(run, switch=switch), switch


class _Told:
    """A tracker that knows the step from the pipeline.

    Args:
        guider: the one that does guidance.
    """

    def __init__(self, guider: Any) -> None:
        self.pipe = SimpleNamespace(guider=guider)
        self.branch = ""
        self._step, self._count, self._timestep = 0, 1, 0.0
        self._arrived = True
        self.reset()

    def reset(self) -> None:
        """What is called next begins a new run."""
        self._last = -1

    def arrive(self, step: int, count: int, timestep: Any) -> None:
        """Note a step, whose calls are to come."""
        value = float(torch.as_tensor(timestep).reshape(-1)[0])
        self._step, self._count, self._timestep = int(step), max(count, step + 1), value
        self._arrived = True

    def tick(self, timestep: Any, context: Any = None) -> Tick:
        """See `cmlora.tracker.StepTracker`."""
        fresh = self._last < 0 or (self._arrived and self._step <= self._last)
        repeated = not (fresh or self._arrived)
        self._last, self._arrived = self._step, False
        return Tick(self._step, self._count, self._timestep, self.branch, fresh, repeated)


def _check_told(method: str, options: Mapping[str, Any]) -> None:
    """See that a method needs nothing that only a pipeline or a user of `compose` can tell."""
    missing = "the prompt" if weighs(method, options) else ""
    if method == "freeswitch":
        missing = "measured profiles"
    if missing:
        raise CmloraError(f"{method} goes by {missing}, unknown to a guider; use cmlora.compose")


def _strengths(loras: Any) -> Any:
    """Pairs, which a saved configuration holds because they keep their order, as a mapping."""
    if isinstance(loras, str | Mapping) or all(isinstance(each, str) for each in loras):
        return loras
    return {name: float(weight) for name, weight in loras}


def _guider(inner: Any) -> Any:
    """The inner guider."""
    if inner is None:
        return ClassifierFreeGuidance()
    if isinstance(inner, Mapping):
        name = inner.get("_class_name", "")
        found: Any = getattr(diffusers, str(name), None)
        known = isinstance(found, type) and issubclass(found, BaseGuidance)
        if not known:
            raise CmloraError(f"diffusers has no guider {name!r}")
        return found.from_config(dict(inner))
    if not isinstance(inner, BaseGuidance):
        raise CmloraError(f"inner={inner!r}: expected one of diffusers' guiders")
    return inner
