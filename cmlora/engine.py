"""Carries plans out around any denoiser: activate LoRAs, run, combine, count."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager

from cmlora import hooks, outputs
from cmlora.plan import Member, Pass, Plan, Policy, Step, Strategy
from cmlora.switching import AdapterSwitch
from cmlora.tracker import StepTracker, Tick

if TYPE_CHECKING:
    from torch import nn

HOOK = "cmlora"
"""Name of the hook in a denoiser's registry."""

_SAMPLE = ("sample", "hidden_states", "x")
_TIMESTEP = ("timestep", "timesteps", "t")
_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


_EMPTY = Plan((Pass({}),))


@dataclass(frozen=True)
class Report:
    """What the last run did.

    Args:
        method: the method's name.
        steps: denoising steps carried out.
        calls: passes of the denoiser, full and light.
        full: full passes by `Pass.key`.
        light: passes that reused a cached feature, by `Pass.key`.
        seconds: wall time from the first denoiser call to the end of the last one.
        macs: multiply-accumulates of all passes, if somebody counted them.
    """

    method: str
    steps: int = 0
    calls: int = 0
    full: Mapping[str, int] = field(default_factory=dict)
    light: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    macs: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)


class FeatureCache(Protocol):
    """What a hook needs of a cache: one slot of features per key."""

    def run(self, key: Any, *, reuse: bool, record: bool) -> AbstractContextManager[bool]:
        """A context for one pass; gives whether the pass is light."""

    def discard(self, key: Any) -> None:
        """Free a slot."""

    def clear(self) -> None:
        """Free all slots."""


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
        strategy: says what to run.
        members: the LoRAs, in the user's order.
        policy: when cached features are refreshed.
        switch: activates LoRAs in the denoiser.
        tracker: finds the step.
        method: the strategy's name in reports.
        options: keyword arguments of the strategy.
        cache: where features are kept, or ``None`` to run every pass in full.
        prepare: called at the first denoiser call of every run.
    """

    _is_stateful = True

    def __init__(
        self,
        strategy: Strategy,
        members: Sequence[Member],
        policy: Policy,
        *,
        switch: AdapterSwitch,
        tracker: StepTracker,
        method: str = "",
        options: Mapping[str, Any] | None = None,
        cache: FeatureCache | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.contexts = StateManager(_NoState)
        self._strategy = strategy
        self._members = tuple(members)
        self._policy = policy
        self._options = dict(options or {})
        self._switch = switch
        self._tracker = tracker
        self._method = method
        self._cache = cache
        self._prepare = prepare
        self._positions: dict[str, int] = {}
        self._observed: tuple[Mapping[str, float], ...] = ()
        self._full: Counter[str] = Counter()
        self._light: Counter[str] = Counter()
        self._begin()

    @property
    def report(self) -> Report:
        """Of the last run, finished or not."""
        return Report(
            method=self._method,
            steps=self._steps,
            calls=self._full.total() + self._light.total(),
            full=dict(self._full),
            light=dict(self._light),
            seconds=self._stopped - self._started,
        )

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Called by diffusers when the hook goes on: learns the denoiser's signature."""
        self._positions = {n: i for i, n in enumerate(inspect.signature(module.forward).parameters)}
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by diffusers at the end of a run: the next call begins a new one."""
        self._tracker.reset()
        if self._cache is not None:
            self._cache.clear()
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the denoiser's forward."""
        started = time.perf_counter()
        try:
            output = self._carry_out(module, args, kwargs, started)
        except BaseException:
            self.reset_state(module)  # an interrupted run has no continuation
            raise
        self._stopped = time.perf_counter()
        return output

    def _carry_out(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], now: float
    ) -> Any:
        """Run the plan of this call."""
        context = self._outer_context()
        tick = self._tracker.tick(self._argument(_TIMESTEP, args, kwargs), context)
        if tick.fresh:
            self._begin(hooks.stateful_hooks(module, besides=self), now)
            self._prepare()
        sample = _as_tensor(self._argument(_SAMPLE, args, kwargs))
        if not tick.repeated:
            self._steps += 1
            step = Step(tick.index, tick.count, tick.timestep, sample, self._observed)
            self._plan = self._strategy(step, self._members, self._policy, **self._options)
        plan = self._plan
        seen: Counter[str] = Counter()
        results = []
        for single in plan.passes:
            slot = (single.key, seen[single.key], tick.branch, _shape(sample))
            seen[single.key] += 1
            with self._isolated(module, slot, tick, context):
                results.append(self._run(single, slot, tick, args, kwargs))
        if plan.observe is not None and not tick.repeated and sample is not None:
            stacked = outputs.stack([outputs.leaf(result) for result in results])
            self._observed = (*self._observed, plan.observe(sample, stacked))
        return outputs.combine(results, plan)

    def _run(
        self, single: Pass, slot: Any, tick: Tick, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One pass through the original denoiser."""
        self._switch.activate(single.weights)
        # UNets pop residuals from the lists they are given, so every pass gets its own
        own = {name: list(v) if isinstance(v, list) else v for name, v in kwargs.items()}
        if self._cache is None:
            self._full[single.key] += 1
            return self.fn_ref.original_forward(*args, **own)
        last = tick.index == tick.count - 1
        steered = any(kwargs.get(name) is not None for name in _RESIDUALS)
        if steered:  # residuals of a ControlNet or an adapter enter where a light pass skips
            self._cache.discard(slot)
        with self._cache.run(slot, reuse=single.may_reuse, record=not (last or steered)) as light:
            (self._light if light else self._full)[single.key] += 1
            result = self.fn_ref.original_forward(*args, **own)
        if last:
            self._cache.discard(slot)
        return result

    def _begin(
        self, neighbours: Sequence[tuple[ModelHook, nn.Module]] = (), now: float = 0.0
    ) -> None:
        """Start the books of a run; nothing of an earlier one may reach into it."""
        self._steps = 0
        self._full.clear()
        self._light.clear()
        self._started = self._stopped = now
        self._observed = ()
        self._plan = _EMPTY
        self._neighbours = bool(neighbours)
        for hook, owner in neighbours:
            hook.reset_state(owner)
        if self._cache is not None:
            self._cache.clear()

    @contextmanager
    def _isolated(
        self, module: nn.Module, slot: Any, tick: Tick, outer: CacheContext | None
    ) -> Iterator[None]:
        """Give other caches on the denoiser a state of their own for every pass."""
        if not self._neighbours:
            yield
            return
        key, ordinal, branch, _ = slot
        inner = CacheContext(
            f"{branch}/{key}#{ordinal}",
            step_index=tick.index,
            num_inference_steps=tick.count,
            timestep=None if outer is None else outer.timestep,
            sigma=None if outer is None else outer.sigma,
        )
        with hooks.cache_context(module, inner, outer):
            yield

    def _outer_context(self) -> CacheContext | None:
        """The cache context the pipeline set, if it sets one."""
        try:
            return self.contexts.context
        except ValueError:
            return None

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


def _as_tensor(sample: Any) -> torch.Tensor | None:
    """The denoiser's input (B, C, H, W); some models take a list of one tensor per picture."""
    if isinstance(sample, list):
        same = len({tensor.shape for tensor in sample}) == 1
        return torch.stack(sample) if same else None
    return sample if isinstance(sample, torch.Tensor) else None


def _shape(sample: torch.Tensor | None) -> tuple[int, ...]:
    """Part of a slot's name: a feature fits only an input of the same shape."""
    return () if sample is None else tuple(sample.shape)
