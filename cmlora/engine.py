"""Carries plans out around any denoiser: activate LoRAs, run, combine, count."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager

from cmlora import guided, halves, outputs
from cmlora.batching import Execution, Gauge, MixedBatch, Unbatchable, split
from cmlora.caching.contexts import Contexts
from cmlora.caching.store import FeatureCache
from cmlora.calls import Call, Signature, Slot, own, slots_of, whole, without_scale
from cmlora.denoisers import STEERING, Kind, kind
from cmlora.errors import CmloraError
from cmlora.guided import Side
from cmlora.latents import as_tensor, layout
from cmlora.pairs import Pairs, Rows
from cmlora.plan import Pass, Plan, Strength, alike
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


class _Kept(NamedTuple):
    """Outputs of a step."""

    step: int
    rows: Mapping[Slot, torch.Tensor]


class _NoState(BaseState):  # type: ignore[misc]
    """The hook keeps its state itself; diffusers only has to hand it the cache context."""

    def reset(self) -> None:
        """Nothing to reset."""


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
        execution: ``sequential``, ``batched`` (the passes with one LoRA each in one call),
            ``auto``, as many in one call as there is memory for, or ``fused``, where the switch
            exchanges whole weights.
        absent: LoRAs that act in another denoiser of the pipeline and not in this one, where a pass
            for them would be one of the base model.
        shared: the unconditional branch has to be one for all LoRAs; where nobody knows which it
            is, that is an error.
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
        absent: Collection[str] = (),
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.contexts = StateManager(_NoState)
        self._run = run
        self._switch = switch
        self._cache = cache
        self._prompts = prompts
        self._execution = execution
        self._absent = frozenset(absent)
        self._shared = shared
        self._module: nn.Module | None = None
        self._kind = Kind("")
        self._others: Contexts | None = None
        self._kept: dict[str, _Kept] = {}
        self._strengths: dict[Slot, Mapping[str, Strength]] = {}
        self._ran: dict[Slot, int] = {}

    @property
    def report(self) -> Report:
        """Of the last run, finished or not."""
        return self._run.report

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Called by diffusers when the hook goes on: learns the denoiser's signature.

        The same hook may go on the same denoiser again, and knows where it was.
        """
        if self._module is module:
            return module
        self._module = module
        self._signature = Signature(module)
        self._pairs = Pairs(self._run, self._signature, self._rows)
        self._kind = kind(module)
        self._mixed = MixedBatch(self._switch, self._kind)
        self._gauge = Gauge(module)

        def begin() -> None:
            self._others = Contexts(module, besides=self)
            self._others.reset()
            self._gauge.forget()
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
        find = partial(self._signature.find, args=args, kwargs=kwargs)
        tick = self._run.tick(find(_TIMESTEP), context, now)
        sample = as_tensor(find(_SAMPLE))
        guidance = guided.guidance(
            self._run.pipe,
            self._module,
            self._kind,
            tick.branch,
            sample,
            named=context is not None,
            whole=kwargs.get("skip_layers") is None,
        )
        maps = layout(self._kind, sample, lambda name: find((name,)))
        if guidance.side == "both" and self._kind.first == "cond":
            maps = replace(maps, swapped=True)
        latent = None if sample is None else maps.unpack(sample)
        plan = self._run.plan(tick, latent, guidance, self._absent)
        if self._execution == "fused" or any(single.gate for single in plan.passes):
            # what stands in for the layers does not read their scale, which this argument changes
            scale, kwargs = without_scale(kwargs)
            plan = plan.times(scale)
        call = Call(args, kwargs, tick, context, sample, guidance)
        if self._shared and guidance.side is None and any(p.branch != "both" for p in plan.passes):
            raise CmloraError(f"uncond='shared' cannot be carried out: {guidance.doubt}")
        if len(plan.passes) > 1 and kwargs.get("kv_cache_mode") is not None:
            raise CmloraError(
                "kv_cache holds the keys and values of one LoRA; LoRAs cannot share it: use a "
                "pipeline without it, or a method with one pass such as merge"
            )
        return self._pairs.carry_out(plan, call, maps, latent)

    def _rows(self, plan: Plan, call: Call) -> Rows:
        """Run the passes of a call, and keep what the plan wants kept."""
        slots = slots_of(plan, call)
        results = self._results(plan, slots, call)
        return Rows(results, self._keep(slots, call, results) if plan.keep else None)

    def _results(self, plan: Plan, slots: Sequence[Slot], call: Call) -> list[Any]:
        """The outputs of all passes, in their order."""
        if self._cache is not None and self._steered(call):
            for slot in slots:
                self._cache.discard(slot)
        done = halves.sides(plan.passes, call.guidance.side)
        names, before = whole(slots, call), self._before(call)
        recalled = [
            single.recall and {name, names[0]} <= before.keys()
            for single, name in zip(plan.passes, names, strict=True)
        ]
        wanted = [i for i, side in enumerate(done) if side and not recalled[i]]
        self._note([slots[i] for i in wanted], call.tick.index)
        results: list[Any] = [None] * len(slots)
        for group in self._groups(plan, slots, call, wanted):
            chosen = [slots[i] for i in group]
            passes = [plan.passes[i] for i in group]
            side = done[group[0]] or "both"
            if len(group) == 1:
                results[group[0]] = self._one(passes[0], chosen[0], call, side)
            else:
                many = self._together(passes, chosen, call, side)
                for index, result in zip(group, many, strict=True):
                    results[index] = result
        if self._cache is not None and _last(call.tick):
            for slot in slots:
                self._cache.discard(slot)
        ran = [None if again else side for side, again in zip(done, recalled, strict=True)]
        results = halves.complete(self._kind, results, ran)
        for index, again in enumerate(recalled):
            if again:
                distance = before[names[index]] - before[names[0]]
                results[index] = outputs.moved(results[0], distance)
        return results

    def _note(self, slots: Sequence[Slot], index: int) -> None:
        """Note which slots' passes run; what one held before a pause is dropped."""
        for slot in slots:
            if self._cache is not None and index - self._ran.get(slot, index) > 1:
                self._cache.discard(slot)
            self._ran[slot] = index

    def _keep(
        self, slots: Sequence[Slot], call: Call, results: Sequence[Any]
    ) -> torch.Tensor | None:
        """Keep outputs for the next step; gives those of the step before in the same order."""
        names, before = whole(slots, call), self._before(call)
        rows = outputs.stack([outputs.leaf_tensor(result) for result in results])
        self._kept[call.tick.branch] = _Kept(call.tick.index, dict(zip(names, rows, strict=True)))
        known = [before[name] for name in names if name in before]
        return torch.stack(known) if len(known) == len(slots) else None

    def _before(self, call: Call) -> Mapping[Slot, torch.Tensor]:
        """The outputs kept at the step before, or at this one."""
        kept = self._kept.get(call.tick.branch)
        return {} if kept is None or call.tick.index - kept.step > 1 else kept.rows

    def _groups(
        self, plan: Plan, slots: Sequence[Slot], call: Call, wanted: Sequence[int]
    ) -> list[list[int]]:
        """Which of the wanted passes run in one call."""
        alone = [[index] for index in wanted]
        if self._execution in ("sequential", "fused") or len(wanted) <= 1:
            return alone
        try:
            self._check_batching(plan, call)
        except Unbatchable:
            if self._execution == "batched":
                raise
            return alone
        assert call.sample is not None  # checked above
        most = _WHOLE
        if self._execution == "auto":
            most = self._gauge.most(call.sample.device, max(slots[i].shape[0] for i in wanted))
        light = [self._reusable(plan.passes[i], slots[i]) for i in wanted]
        groups = self._mixed.groups([plan.passes[i] for i in wanted], light, most)
        return [[wanted[i] for i in group] for group in groups]

    def _check_batching(self, plan: Plan, call: Call) -> None:
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

    def _one(self, single: Pass, slot: Slot, call: Call, side: Side) -> Any:
        """One pass through the original denoiser."""
        self._switch.activate(single.weights, single.gate)
        args, kwargs = call.args, call.kwargs
        if self._prompts is not None:
            args, kwargs = (), self._prompts.arguments(slot.loras, self._signature.named(call))
        if side != "both" and call.sample is not None:
            named = kwargs if self._prompts is not None else self._signature.named(call)
            args, kwargs = (), halves.take(self._kind, named, len(call.sample), side)
        measuring: AbstractContextManager[None] = nullcontext()
        if self._execution == "auto" and call.sample is not None and not self._gauge.known:
            measuring = self._gauge.measuring(call.sample.device, slot.shape[0])
        isolated = self._isolated(single, slot, call)
        with measuring, isolated, self._cached([slot], [single], call) as light:
            self._run.count(single, light=light, side=side)
            with self._run.counting((slot.loras, slot.shape, side, light)):
                return self.fn_ref.original_forward(*args, **own(kwargs))

    def _together(
        self, passes: Sequence[Pass], slots: Sequence[Slot], call: Call, side: Side
    ) -> list[Any]:
        """Several passes as one batch; one by one once the model has turned out to mix samples."""
        try:
            return self._many(passes, slots, call, side)
        except Unbatchable:
            if self._execution == "batched":
                raise
            self._execution = "sequential"
            return [self._one(p, s, call, side) for p, s in zip(passes, slots, strict=True)]

    def _many(
        self, passes: Sequence[Pass], slots: Sequence[Slot], call: Call, side: Side
    ) -> list[Any]:
        """Several passes as one batch."""
        assert call.sample is not None
        batch, times = len(call.sample), len(passes)
        named = halves.take(self._kind, self._signature.named(call), batch, side)
        batch = batch if side == "both" else batch // 2
        repeated = {
            name: self._mixed.repeat(name, value, times, batch) for name, value in named.items()
        }
        with self._mixed.names(passes, batch), self._cached(slots, passes, call) as light:
            loras = tuple(slot.loras for slot in slots)
            with self._run.counting((loras, slots[0].shape, side, light)):
                output = self.fn_ref.original_forward(**own(repeated))
        for single in passes:
            self._run.count(single, light=light, side=side)
        parts = split(outputs.leaf(output), times)
        return [outputs.replace_leaf(output, part) for part in parts]

    def _cached(
        self, slots: Sequence[Slot], passes: Sequence[Pass], call: Call
    ) -> AbstractContextManager[bool]:
        """Within the context the denoiser replays or records the slots' features."""
        if self._cache is None:
            return nullcontext(False)
        record = not (_last(call.tick) or self._steered(call))
        reuse = all(map(self._reusable, passes, slots))
        for slot, single in zip(slots, passes, strict=True):
            if not alike(single.weights, self._strengths.get(slot, single.weights)):
                self._cache.discard(slot)
            if not reuse:
                self._strengths[slot] = single.weights
        return self._cache.run(*slots, reuse=reuse, record=record, at=call.tick.index)

    def _reusable(self, single: Pass, slot: Slot) -> bool:
        """Whether a pass may be light: its slot holds features made with about its strengths."""
        if self._cache is None or not (single.may_reuse and self._cache.holds(slot)):
            return False
        return alike(single.weights, self._strengths.get(slot, single.weights))

    def _isolated(self, single: Pass, slot: Slot, call: Call) -> AbstractContextManager[None]:
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
        return self._others.isolated(single.weights, inner, outer)

    def _forget(self) -> None:
        """Nothing of a run may reach into another one."""
        self._kept.clear()
        self._pairs.forget()
        self._strengths.clear()
        self._ran.clear()
        if self._cache is not None:
            self._cache.clear()

    def _steered(self, call: Call) -> bool:
        """Whether something enters where a light pass skips (a ControlNet, an adapter)."""
        find = self._signature.find
        return any(find((name,), call.args, call.kwargs) is not None for name in STEERING)

    def _outer_context(self) -> CacheContext | None:
        """The cache context the pipeline set, if it sets one."""
        try:
            return self.contexts.context
        except ValueError:
            return None


def _last(tick: Tick) -> bool:
    """Whether features of this call are of no use to a later one."""
    return tick.index == tick.count - 1
