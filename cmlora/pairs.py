"""Guidance in two calls of the denoiser: what they have to know of each other.

The pipeline calls for the conditional branch first and has its answer before it calls for the
other. What weighs the LoRAs by the conditional outputs alone keeps them for the second call. What
weighs them by both runs the unconditional passes in the first call, with the arguments the second
one had at the step before, and has the second answer ready.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cmlora import halves, outputs
from cmlora.calls import Call, Signature
from cmlora.latents import Layout
from cmlora.plan import Observe, Plan

if TYPE_CHECKING:
    from cmlora.run import Run

_logger = logging.getLogger(__name__)


class Rows(NamedTuple):
    """What the passes of a call gave.

    Args:
        results: outputs by pass.
        previous: those of the step before, (P, B, ...), where a plan keeps them.
    """

    results: list[Any]
    previous: Tensor | None


class _First(NamedTuple):
    """A step's conditional call."""

    step: int
    rows: Rows
    arguments: dict[str, Any]


class _Before(NamedTuple):
    """What the two calls of the step before were given, and the name of the second."""

    conditional: dict[str, Any]
    unconditional: dict[str, Any]
    branch: str


class _Ready(NamedTuple):
    """The answer to the unconditional call, if it comes with these arguments."""

    arguments: dict[str, Any]
    rows: Rows
    output: Any


class Pairs:
    """Carries out plans at one denoiser, the two calls of a step as one where they belong together.

    Args:
        run: keeps what plans observe.
        signature: of the denoiser.
        make: runs the passes of a plan for a call.
    """

    def __init__(self, run: Run, signature: Signature, make: Callable[[Plan, Call], Rows]) -> None:
        self._run = run
        self._signature = signature
        self._make = make
        self._warned: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """Nothing of a run may reach into another one."""
        self._first: _First | None = None
        self._before: _Before | None = None
        self._ready: _Ready | None = None

    def carry_out(self, plan: Plan, call: Call, maps: Layout, latent: Tensor | None) -> Any:
        """The combined output of a call.

        Args:
            plan: of the step.
            call: the call.
            maps: how its latents become maps.
            latent: the noisy latent as maps, if it is one tensor.
        """
        side, paired, again = call.guidance.side, call.guidance.paired, call.tick.repeated
        if paired and side == "cond" and not again:
            return self._conditional(plan, call, maps, latent)
        first = self._first
        if paired and side == "uncond" and first is not None and first.step == call.tick.index:
            return self._unconditional(plan, call, maps, latent, first)
        if plan.both is not None and again:
            late = (
                "the conditional one does not come first" if paired else "there are more than two"
            )
            why = call.guidance.doubt or late
            self._warn(f"guidance in several calls, and this one is weighed by itself: {why}")
        rows = self._make(plan, call)
        if plan.observe is not None and latent is not None and not again:
            self._run.observed(_observed(plan.observe, latent, maps, rows.results))
        return outputs.combine(rows.results, plan, maps, rows.previous)

    def _conditional(self, plan: Plan, call: Call, maps: Layout, latent: Tensor | None) -> Any:
        rows = self._make(plan, call)
        given = _copied(self._signature.named(call)) if plan.ahead else {}
        before, self._before, self._ready = self._before, None, None
        self._first = _First(call.tick.index, rows, given)
        if plan.observe is not None and latent is not None:
            # measured by itself if the other call does not come
            self._run.measure(partial(_observed, plan.observe, latent, maps, rows.results))
        if plan.both is None or not plan.ahead:
            return outputs.combine(rows.results, plan, maps, rows.previous)
        if before is None:
            coming = call.guidance.scale is not None
            return outputs.combine(rows.results, plan, maps, None if coming else rows.previous)
        foreseen = _foreseen(given, before)
        other = self._make(plan, _second(call, foreseen, before.branch))
        results = _whole(other, rows)
        previous = _both(other.previous, rows.previous)
        answers = halves.parted(outputs.combine(results, plan.both, maps, previous))
        self._ready = _Ready(foreseen, other, answers[0])
        return answers[1]

    def _unconditional(
        self, plan: Plan, call: Call, maps: Layout, latent: Tensor | None, first: _First
    ) -> Any:
        ready, self._first, self._ready = self._ready, None, None
        given = _copied(self._signature.named(call)) if plan.ahead else {}
        if plan.ahead:
            self._before = _Before(first.arguments, given, call.tick.branch)
        foreseen = ready is not None and _same(ready.arguments, given)
        rows = ready.rows if ready is not None and foreseen else self._make(plan, call)
        results = _whole(rows, first.rows)
        if plan.observe is not None and latent is not None:
            self._run.measure(None)
            twice = torch.cat([latent, latent])
            self._run.observed(_observed(plan.observe, twice, maps, results))
        if plan.both is None:
            return outputs.combine(rows.results, plan, maps, rows.previous)
        if ready is not None and foreseen:
            return ready.output
        if ready is not None:
            self._warn("the unconditional prompt changed during the run, one step too late")
        previous = _both((ready.rows if ready else rows).previous, first.rows.previous)
        if ready is None and plan.ahead and (plan.compare is None or previous is not None):
            self._warn(
                "guidance in two calls: at the first step the conditional prediction is weighed by "
                "itself, before there is an unconditional one"
            )
        return halves.parted(outputs.combine(results, plan.both, maps, previous))[0]

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            _logger.warning(text)


def _observed(
    observe: Observe, latent: Tensor, maps: Layout, results: Sequence[Any]
) -> Mapping[str, float]:
    stacked = outputs.stack([outputs.leaf_tensor(result) for result in results])
    return observe(latent, maps.unpack(stacked))


def _second(call: Call, arguments: dict[str, Any], branch: str) -> Call:
    """The unconditional call of a step, before it comes."""
    tick = replace(call.tick, branch=branch, fresh=False, repeated=True)
    guidance = replace(call.guidance, side="uncond")
    return call._replace(args=(), kwargs=arguments, tick=tick, guidance=guidance)


def _whole(unconditional: Rows, conditional: Rows) -> list[Any]:
    """Outputs by pass for both branches."""
    pairs = zip(unconditional.results, conditional.results, strict=True)
    return [halves.joined(one, other) for one, other in pairs]


def _both(unconditional: Tensor | None, conditional: Tensor | None) -> Tensor | None:
    """The outputs of the step before, (P, 2 B, ...)."""
    if unconditional is None or conditional is None:
        return None
    return torch.cat([unconditional, conditional], 1)


def _copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that stay when a pipeline writes into its dictionaries between the calls."""
    return {n: v.copy() if isinstance(v, dict | list) else v for n, v in arguments.items()}


def _foreseen(now: Mapping[str, Any], before: _Before) -> dict[str, Any]:
    """What the second call will be given: what it shares with the first, and else as before."""
    shared = {
        name
        for name, value in before.unconditional.items()
        if name in now and _same(before.conditional.get(name), value)
    }
    return {n: now[n] if n in shared else value for n, value in before.unconditional.items()}


def _same(one: Any, other: Any) -> bool:
    """Whether arguments are equal, tensors among them."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)
