"""`MultiLoRAGuidance`: several LoRAs in diffusers' Modular pipelines, as a guider."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import CacheContext
from torch import nn

from cmlora import outputs
from cmlora.caching.contexts import Contexts
from cmlora.caching.policy import none
from cmlora.denoisers import kind
from cmlora.errors import CmloraError
from cmlora.latents import MAPS, layout
from cmlora.members import check_loaded, described
from cmlora.plan import Plan, Step
from cmlora.strategies import METHODS, check_options
from cmlora.switching import AdapterSwitch

_SAMPLE = ("sample", "hidden_states", "x")
_PREDICTIONS = ["pred_cond", "pred_uncond"]


class MultiLoRAGuidance(BaseGuidance):  # type: ignore[misc]
    """Composes LoRAs, and leaves guidance to another guider.

    A Modular pipeline asks its guider for the batches to run and hands the predictions back. This
    one asks the inner guider, has every batch run once per pass of the composition, combines those
    predictions and gives the inner guider what it expects. `cmlora.compose` works with Modular
    pipelines too and is the cheaper door, since it can reuse features; this one needs nothing but
    the place for a guider, and is saved with the pipeline. Features are not reused.

    Args:
        loras: adapter names, or adapter names with strengths, as a mapping or in pairs; they must
            be loaded in the denoiser.
        inner: the guider that does guidance, or its configuration; classifier-free guidance with
            diffusers' defaults if not given.
        method: name of a composition method.
        options: of the method.

    Raises:
        CmloraError: for an unknown method, option or inner guider.
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
        self._strategy = METHODS[method].object
        self._options = check_options(method, options or {})
        self._plan: Plan | None = None
        self._switch: AdapterSwitch | None = None
        self._denoiser: nn.Module | None = None
        self._others: Contexts | None = None
        self._pass = ExitStack()
        self._maps = MAPS
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
        """How many predictions the inner guider combines; each is made once per pass."""
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
        """Called by the pipeline before every step: asks the strategy for a plan.

        Args:
            step: index of the step.
            num_inference_steps: how many there are.
            timestep: the scheduler's value.
        """
        super().set_state(step, num_inference_steps, timestep)
        self.inner.set_state(step, num_inference_steps, timestep)
        value = float(torch.as_tensor(timestep).reshape(-1)[0])
        now = Step(step, num_inference_steps, value)
        self._plan = self._strategy(now, self._members, none(), **self._options)
        if step == 0:
            self._others = None

    def prepare_inputs(self, data: Any) -> list[Any]:
        """The batches of the inner guider, each once per pass."""
        return self._per_pass(self.inner.prepare_inputs(data))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        """The same for pipelines that name the fields of their state."""
        return self._per_pass(self.inner.prepare_inputs_from_block_state(data, input_fields))

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Called before every batch: activates the LoRAs of its pass.

        Raises:
            CmloraError: if they are not loaded in this denoiser.
        """
        plan = self._planned()
        branch, number = divmod(self._count_prepared, len(plan.passes))
        super().prepare_models(denoiser)
        self.inner._count_prepared = branch
        self.inner.prepare_models(denoiser)
        if self._switch is None or self._denoiser is not denoiser:
            self._denoiser, self._switch = denoiser, AdapterSwitch(denoiser)
            check_loaded(self._members, [self._switch], needed=True)
        if self._others is None:
            self._others = Contexts(denoiser, besides=ModelHook())
            self._others.reset()
        single = plan.passes[number]
        loras = tuple(sorted(single.weights))
        self._pass.callback(self._switch.restore, self._switch.snapshot())
        self._switch.freeze()
        self._switch.activate(single.weights)
        if self._others:
            name = f"{branch}/{loras!r}#{number}"
            inner = CacheContext(name, self._step, self._num_inference_steps)
            self._pass.enter_context(self._others.isolated(loras, inner, None))
        if not callable(plan.combine) and plan.compare is None:
            return
        handle = denoiser.register_forward_pre_hook(self._note, with_kwargs=True)
        self._pass.callback(handle.remove)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Called after every batch: the denoiser's adapters are as before."""
        self._pass.close()
        self.inner.cleanup_models(denoiser)

    def __call__(self, data: list[Any]) -> Any:
        """Combine the predictions of the passes, then guide.

        Args:
            data: the batches of `prepare_inputs`, in their order, with ``noise_pred``.

        Raises:
            ValueError: if predictions are missing.
        """
        plan = self._planned()
        count = len(plan.passes)
        if len(data) != count * self.num_conditions:
            raise ValueError(
                f"{len(data)} predictions for {count} passes and {self.num_conditions} branches"
            )
        combined = []
        for start in range(0, len(data), count):
            batches = data[start : start + count]
            batch = copy.copy(batches[0])
            batch.noise_pred = outputs.combine([b.noise_pred for b in batches], plan, self._maps)
            combined.append(batch)
        return self.inner(combined)

    def _per_pass(self, batches: list[Any]) -> list[Any]:
        count = len(self._planned().passes)
        return [copy.copy(batch) for batch in batches for _ in range(count)]

    def _planned(self) -> Plan:
        if self._plan is None:
            raise CmloraError("MultiLoRAGuidance: call set_state before every step")
        return self._plan

    def _note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn how the denoiser's latents are laid out."""
        sample = next((kwargs[n] for n in _SAMPLE if n in kwargs), args[0] if args else None)
        tensor = sample if isinstance(sample, torch.Tensor) else None
        self._maps = layout(kind(module), tensor, kwargs.get)


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
