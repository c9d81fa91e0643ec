"""Carries plans out around any denoiser: activate LoRAs, run, combine, count."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager

from cmlora import outputs
from cmlora.batching import Execution, Gauge, MixedBatch, Unbatchable, split
from cmlora.caching.contexts import Contexts
from cmlora.denoisers import STEERING, Kind, kind
from cmlora.errors import CmloraError
from cmlora.latents import layout
from cmlora.plan import Pass, Plan
from cmlora.prompts import Prompts
from cmlora.run import Report as Report
from cmlora.run import Run
from cmlora.switching import AdapterSwitch
from cmlora.tracker import Tick

if TYPE_CHECKING:
    from torch import nn

HOOK = "cmlora"
"""Name of the hook in a denoiser's registry."""

_SAMPLE = ("sample", "hidden_states", "x")
_TIMESTEP = ("timestep", "timesteps", "t")
_WHOLE = 2**30


class FeatureCache(Protocol):
    """What a hook needs of a cache: one slot of features per key."""

    def holds(self, key: Any) -> bool:
        """Whether the slot is taken."""

    def run(self, *keys: Any, reuse: bool, record: bool, at: int) -> AbstractContextManager[bool]:
        """A context for passes that run as one batch; gives whether they are light."""

    def discard(self, key: Any) -> None:
        """Free a slot."""

    def clear(self) -> None:
        """Free all slots."""


class _NoState(BaseState):  # type: ignore[misc]
    """The hook keeps its state itself; diffusers only has to hand it the cache context."""

    def reset(self) -> None:
        """Nothing to reset."""


class _Slot(NamedTuple):
    """What a pass's features are kept under."""

    loras: tuple[str, ...]
    ordinal: int
    branch: str
    shape: tuple[int, ...]

    @property
    def context(self) -> str:
        """A name for diffusers' cache context."""
        return f"{self.branch}/{self.loras!r}#{self.ordinal}"


class _Call(NamedTuple):
    """One call of the denoiser by the pipeline."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tick: Tick
    context: CacheContext | None
    sample: torch.Tensor | None


class CompositionHook(ModelHook):  # type: ignore[misc]
    """Turns one call of a denoiser into the passes of a plan.

    The denoiser and the pipeline stay as they are: the hook runs the original forward once per
    pass and hands one combined raw output back, before guidance and before the scheduler.
    The strategy is asked once per step; further calls at the same step (guidance in separate
    calls) carry out the same plan with their own cache slots.

    Args:
        run: asks the strategy and counts; shared by the hooks of all denoisers of a pipeline.
        switch: activates LoRAs in the denoiser.
        cache: where features are kept, or ``None`` to run every pass in full.
        prompts: exchanges prompt embeddings per pass, or ``None`` to leave them.
        execution: ``sequential``, ``batched`` (the passes with one LoRA each in one call), or
            ``auto``, as many in one call as there is memory for.
    """

    _is_stateful = True

    def __init__(
        self,
        run: Run,
        *,
        switch: AdapterSwitch,
        cache: FeatureCache | None = None,
        prompts: Prompts | None = None,
        execution: Execution = "sequential",
    ) -> None:
        super().__init__()
        self.contexts = StateManager(_NoState)
        self._run = run
        self._switch = switch
        self._cache = cache
        self._prompts = prompts
        self._execution = execution
        self._kind = Kind("")
        self._positions: dict[str, int] = {}
        self._others: Contexts | None = None

    @property
    def report(self) -> Report:
        """Of the last run, finished or not."""
        return self._run.report

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Called by diffusers when the hook goes on: learns the denoiser's signature."""
        self._positions = {n: i for i, n in enumerate(inspect.signature(module.forward).parameters)}
        self._kind = kind(module)
        self._mixed = MixedBatch(self._switch, self._kind)
        self._gauge = Gauge(module)

        def begin() -> None:
            self._others = Contexts(module, besides=self)
            self._others.reset()
            self._forget()

        self._run.join(begin=begin, end=self._forget)
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by diffusers at the end of a run: the next call begins a new one."""
        self._run.end()
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the denoiser's forward."""
        started = time.perf_counter()
        try:
            output = self._carry_out(args, kwargs, started)
        except BaseException:
            self._run.end()  # an interrupted run has no continuation
            raise
        self._run.stop(time.perf_counter())
        return output

    def _carry_out(self, args: tuple[Any, ...], kwargs: dict[str, Any], now: float) -> Any:
        """Run the plan of this call."""
        context = self._outer_context()
        tick = self._run.tick(self._argument(_TIMESTEP, args, kwargs), context, now)
        sample = _as_tensor(self._argument(_SAMPLE, args, kwargs))
        maps = layout(self._kind, sample, lambda name: self._argument((name,), args, kwargs))
        latent = None if sample is None else maps.unpack(sample)
        call = _Call(args, kwargs, tick, context, sample)
        plan = self._run.plan(tick, latent, self._guidance(call))
        if len(plan.passes) > 1 and kwargs.get("kv_cache_mode") is not None:
            raise CmloraError(
                "kv_cache holds the keys and values of one LoRA; LoRAs cannot share it: use a "
                "pipeline without it, or a method with one pass such as merge"
            )
        results = self._results(plan, call)
        if plan.observe is not None and not tick.repeated and latent is not None:
            stacked = outputs.stack([outputs.leaf_tensor(result) for result in results])
            self._run.observed(plan.observe(latent, maps.unpack(stacked)))
        return outputs.combine(results, plan, maps)

    def _results(self, plan: Plan, call: _Call) -> list[Any]:
        """The outputs of all passes, in their order."""
        slots = self._slots(plan, call)
        if self._cache is not None and self._steered(call):
            for slot in slots:
                self._cache.discard(slot)
        results: list[Any] = [None] * len(slots)
        for group in self._groups(plan, slots, call):
            chosen = [slots[i] for i in group]
            passes = [plan.passes[i] for i in group]
            if len(group) == 1:
                results[group[0]] = self._one(passes[0], chosen[0], call)
            else:
                for index, result in zip(group, self._many(passes, chosen, call), strict=True):
                    results[index] = result
        if self._cache is not None and _last(call.tick):
            for slot in slots:
                self._cache.discard(slot)
        return results

    def _slots(self, plan: Plan, call: _Call) -> list[_Slot]:
        """A slot per pass, never the same twice."""
        seen: Counter[tuple[str, ...]] = Counter()
        slots = []
        for single in plan.passes:
            loras = tuple(sorted(single.weights))
            slots.append(_Slot(loras, seen[loras], call.tick.branch, _shape(call.sample)))
            seen[loras] += 1
        return slots

    def _groups(self, plan: Plan, slots: Sequence[_Slot], call: _Call) -> list[list[int]]:
        """Which passes run in one call."""
        alone = [[index] for index in range(len(slots))]
        if self._execution == "sequential" or len(slots) == 1:
            return alone
        try:
            self._check_batching(plan, call)
        except Unbatchable:
            if self._execution == "batched":
                raise
            return alone
        device = next(iter(_tensors(call.sample)), torch.empty(0)).device
        most = _WHOLE if self._execution == "batched" else self._gauge.most(device)
        light = [
            self._cache is not None and single.may_reuse and self._cache.holds(slot)
            for single, slot in zip(plan.passes, slots, strict=True)
        ]
        return self._mixed.groups(plan.passes, light, most)

    def _check_batching(self, plan: Plan, call: _Call) -> None:
        if self._others:
            raise Unbatchable(
                "passes cannot be batched while one of diffusers' caches is on: it keeps one "
                "state per LoRA; use execution='sequential'"
            )
        if self._prompts is not None:
            raise Unbatchable("passes cannot be batched with text_encoder='per_lora'")
        if call.sample is None:
            raise Unbatchable("passes cannot be batched: the pictures have different sizes")
        self._mixed.check(sorted({name for single in plan.passes for name in single.weights}))

    def _one(self, single: Pass, slot: _Slot, call: _Call) -> Any:
        """One pass through the original denoiser."""
        self._switch.activate(single.weights)
        args, kwargs = call.args, call.kwargs
        if self._prompts is not None:
            args, kwargs = (), self._prompts.arguments(slot.loras, self._named(call))
        measuring: AbstractContextManager[None] = nullcontext()
        if self._execution == "auto" and call.tick.fresh and call.sample is not None:
            measuring = self._gauge.measuring(call.sample.device)
        with measuring, self._isolated(slot, call), self._cached([slot], single, call) as light:
            self._run.count(single, light=light)
            return self.fn_ref.original_forward(*args, **_own(kwargs))

    def _many(self, passes: Sequence[Pass], slots: Sequence[_Slot], call: _Call) -> list[Any]:
        """Several passes as one batch."""
        assert call.sample is not None
        batch, times = len(call.sample), len(passes)
        repeated = {
            name: self._mixed.repeat(name, value, times, batch)
            for name, value in self._named(call).items()
        }
        with self._mixed.names(passes, batch), self._cached(slots, passes[0], call) as light:
            output = self.fn_ref.original_forward(**_own(repeated))
        for single in passes:
            self._run.count(single, light=light)
        parts = split(outputs.leaf(output), times)
        return [outputs.replace_leaf(output, part) for part in parts]

    def _cached(
        self, slots: Sequence[_Slot], single: Pass, call: _Call
    ) -> AbstractContextManager[bool]:
        """Within the context the denoiser replays or records the slots' features."""
        if self._cache is None:
            return nullcontext(False)
        record = not (_last(call.tick) or self._steered(call))
        at = call.tick.index
        return self._cache.run(*slots, reuse=single.may_reuse, record=record, at=at)

    def _isolated(self, slot: _Slot, call: _Call) -> AbstractContextManager[None]:
        """Give other caches on the denoiser a state of their own for every pass."""
        if not self._others:
            return nullcontext()
        outer = call.context
        inner = CacheContext(
            slot.context,
            step_index=call.tick.index,
            num_inference_steps=call.tick.count,
            timestep=None if outer is None else outer.timestep,
            sigma=call.tick.sigma if outer is None or outer.sigma is None else outer.sigma,
        )
        return self._others.isolated(slot.loras, inner, outer)

    def _forget(self) -> None:
        """Nothing of a run may reach into another one."""
        if self._cache is not None:
            self._cache.clear()

    def _steered(self, call: _Call) -> bool:
        """Whether something enters where a light pass skips (a ControlNet, an adapter)."""
        return any(self._argument((name,), call.args, call.kwargs) is not None for name in STEERING)

    def _guidance(self, call: _Call) -> float | None:
        """The guidance scale if the first half of this call's batch is the unconditional one."""
        whole = call.sample is not None and len(call.sample) % 2 == 0
        if self._kind.first != "uncond" or call.context is not None or not whole:
            return None
        return None if call.kwargs.get("skip_layers") is not None else self._run.guidance

    def _outer_context(self) -> CacheContext | None:
        """The cache context the pipeline set, if it sets one."""
        try:
            return self.contexts.context
        except ValueError:
            return None

    def _named(self, call: _Call) -> dict[str, Any]:
        """All arguments of a call by name."""
        given = zip(self._positions, call.args, strict=False)
        return {**dict(given), **call.kwargs}

    def _argument(
        self, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """An argument of the denoiser under whichever of the names it has there."""
        for name in names:
            if name in kwargs:
                return kwargs[name]
            position = self._positions.get(name)
            if position is not None and position < len(args):
                return args[position]
        return None


def _own(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments a pass may change: UNets take residuals from the lists they are given."""
    return {n: v.copy() if isinstance(v, list | dict) else v for n, v in kwargs.items()}


def _last(tick: Tick) -> bool:
    """Whether features of this call are of no use to a later one."""
    return tick.index == tick.count - 1


def _tensors(sample: torch.Tensor | None) -> list[torch.Tensor]:
    return [] if sample is None else [sample]


def _as_tensor(sample: Any) -> torch.Tensor | None:
    """The denoiser's input (B, C, H, W); some models take a list of one tensor per picture."""
    if isinstance(sample, list):
        tensors = all(isinstance(each, torch.Tensor) for each in sample)
        same = tensors and len({tensor.shape for tensor in sample}) == 1
        return torch.stack(sample) if same else None
    return sample if isinstance(sample, torch.Tensor) else None


def _shape(sample: torch.Tensor | None) -> tuple[int, ...]:
    """Part of a slot's name: a feature fits only an input of the same shape."""
    return () if sample is None else tuple(sample.shape)
