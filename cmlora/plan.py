"""The vocabulary of every composition method: what is known at a step, and what to run.

A strategy is a pure function ``(step, members, policy, **options) -> Plan``. It never sees the
model; the engine carries its plan out around any denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["high", "low"]
Scope = Literal["global", "local"]

Strength = float | tuple[tuple[str, float], ...]
"""How strongly a LoRA acts: one number, or one per part of the denoiser.

A tuple holds pairs of a regular expression and a strength. The first pair whose expression is
found in a layer's name (``down_blocks.0.attentions.1.proj_in``) decides; where none is found the
LoRA does not act.
"""


@dataclass(frozen=True)
class Member:
    """One LoRA of a composition, as strategies see it.

    Args:
        name: the adapter's name in the pipeline.
        weight: the user's strength; scales the LoRA's update wherever it is active.
        role: the user's own label of its frequency class; wins over the measurement.
        frequency: measured share of high-frequency energy in its contribution, 0 to 1;
            ``None`` if it was never profiled.
        window: the part of a run, as two fractions of its steps, that holds most of what it
            contributes; ``None`` if it was never profiled.
        category: what the LoRA draws ("character", "style", ...), if the user says so.
        triggers: its trigger words.
        scope: whether it changes the whole picture or a place in it, if the user says so.
        relevance: how much the prompt speaks of it, 0 or more, relative to the others; see
            `cmlora.relevance`.
        importance: measured size of its contribution in the course of a run, pairs of a step
            fraction and a size, ascending by fraction.
        mass: of its update, by module of the denoiser: the sum of the largest entries and the
            sum of all entries, absolute; see `cmlora.strategies.klora`.
    """

    name: str
    weight: float = 1.0
    role: Role | None = None
    frequency: float | None = None
    window: tuple[float, float] | None = None
    category: str | None = None
    triggers: tuple[str, ...] = ()
    scope: Scope | None = None
    relevance: float | None = None
    importance: tuple[tuple[float, float], ...] | None = None
    mass: Mapping[str, tuple[float, float]] | None = field(default=None, hash=False, repr=False)


@dataclass(frozen=True)
class Step:
    """What is known when the denoiser is called.

    Args:
        index: 0 .. count - 1, the denoising step about to run.
        count: how many steps this run has.
        timestep: the scheduler's value.
        sample: the noisy latent going into the denoiser, (B, C, H, W), or ``None`` when a
            schedule is inspected without a model.
        observed: what the plans of earlier steps asked to have measured, oldest first.
        sigma: the noise level as the scheduler counts it; ``None`` if it is not known.
        guidance: the scale of classifier-free guidance, u + s (c - u); ``None`` without it, or if
            it is not known. Of the outputs of a plan the first half is the unconditional branch
            and the second the conditional one, unless they are ``apart``.
        apart: the branches come, or may come, in calls of their own, the conditional one first;
            see `Plan.both`.
        changes: relative change of the denoiser's input since the step before, one number per
            step up to this one, the first 0; empty unless the cache policy asks for it.
    """

    index: int
    count: int
    timestep: float = 0.0
    sample: Tensor | None = field(default=None, compare=False, repr=False)
    observed: tuple[Mapping[str, float], ...] = ()
    sigma: float | None = None
    guidance: float | None = None
    changes: tuple[float, ...] = ()
    apart: bool = False

    @property
    def fraction(self) -> float:
        """Progress through the run, 0 at the first step, always below 1."""
        return self.index / self.count


@dataclass(frozen=True)
class Gate:
    """How the LoRAs of one pass share out the places of every layer; see `cmlora.gating`.

    Args:
        strength: factor on what they add together.
        sharpness: 0 averages them, large values take the one that changes a place most.
        everywhere: names of LoRAs that are added at every place, as without a gate.
    """

    strength: float = 1.0
    sharpness: float = 4.0
    everywhere: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass:
    """One call of the denoiser.

    Args:
        weights: strength of every LoRA that is active; empty is the base model alone.
        may_reuse: run only the shallow branch if this pass's cache slot holds a feature;
            otherwise (or if the slot is empty) run in full and record.
        branch: which branch of guidance is run. The output of the other one is taken from the
            first pass of the plan that has it. Without guidance there is only the conditional one.
        recall: do not run, but take the output of the plan's first pass and add what this pass
            differed by from it at the step before. Without a kept output it is run.
        gate: how several LoRAs share the layers; ``None`` adds them up.
    """

    weights: Mapping[str, Strength]
    may_reuse: bool = False
    branch: Literal["both", "cond", "uncond"] = "both"
    recall: bool = False
    gate: Gate | None = None

    @property
    def key(self) -> str:
        """Name of the cache slot and of the row in reports: LoRA names, or ``base``."""
        return "+".join(sorted(self.weights)) or "base"


Combine = Callable[["Tensor"], "Tensor"]
"""Stacked raw outputs (P, B, C, H, W), in the order of the passes, to one output (B, C, H, W)."""


def alike(one: Mapping[str, Strength], other: Mapping[str, Strength]) -> bool:
    """Whether features computed with some strengths may stand for those with others.

    They may if no LoRA's strength differs by more than a tenth, in any part of the denoiser.

    >>> alike({"a": 1.0}, {"a": 0.95}), alike({"a": 1.0}, {"a": 0.5})
    (True, False)
    """
    if one.keys() != other.keys():
        return False
    return all(_near(strength, other[name]) for name, strength in one.items())


def _near(one: Strength, other: Strength) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        same = [p for p, _ in one] == [p for p, _ in other]
        return same and all(_near(a, b) for (_, a), (_, b) in zip(one, other, strict=True))
    if isinstance(one, tuple) or isinstance(other, tuple):
        return False
    return abs(one - other) <= 0.1 * max(abs(one), abs(other)) + 1e-9


class Compare(Protocol):
    """The same with the stacked outputs of the step before, or ``None`` if there are none."""

    def __call__(self, outputs: Tensor, previous: Tensor | None, /) -> Tensor: ...


Observe = Callable[["Tensor", "Tensor"], Mapping[str, float]]
"""(sample (B, C, H, W), stacked outputs (P, B, C, H, W)) to named numbers for later steps."""


@dataclass(frozen=True)
class Plan:
    """What to run at one step and how to make one output of it.

    Args:
        passes: the calls of the denoiser, in order.
        combine: either one share per pass (they sum to 1, so the combination commutes with
            guidance and with every prediction type), or a function of the stacked outputs.
        observe: measured after the passes and handed to later steps as ``Step.observed``.
        keep: the outputs stay for the next step, for passes with ``recall`` and for ``compare``.
        compare: instead of ``combine``, a function of the stacked outputs and those of the step
            before in the same order; ``None`` for the latter if a pass was not among them.
        both: the same passes with functions of both branches of guidance, the unconditional half
            first, for when they come apart. The plan itself then serves a branch by itself: without
            guidance, and for a conditional call whose outputs decide alone.
        ahead: the conditional result of ``both`` has to do with unconditional outputs, which are
            then made beforehand, with what the unconditional call was given at the step before.

    Raises:
        ValueError: if there is no pass, or shares do not match the passes or do not sum to 1, or
            outputs are compared or recalled that are not kept, or ``both`` has other passes.
    """

    passes: tuple[Pass, ...]
    combine: tuple[float, ...] | Combine = (1.0,)
    observe: Observe | None = None
    keep: bool = False
    compare: Compare | None = None
    both: Plan | None = None
    ahead: bool = False

    def __post_init__(self) -> None:
        if not self.passes:
            raise ValueError("a plan needs at least one pass")
        if self.both is not None and len(self.both.passes) != len(self.passes):
            raise ValueError("a plan for both branches has the same passes")
        if not self.keep and (self.compare or any(each.recall for each in self.passes)):
            raise ValueError("outputs that are recalled or compared must be kept")
        if self.passes[0].recall:
            raise ValueError("the first pass is what others are recalled relative to")
        if self.compare is None and isinstance(self.combine, tuple):
            if len(self.combine) != len(self.passes):
                raise ValueError(f"{len(self.combine)} shares for {len(self.passes)} passes")
            if abs(sum(self.combine) - 1.0) > 1e-6:
                raise ValueError(f"shares {self.combine} sum to {sum(self.combine)}, not 1")

    def times(self, factor: float) -> Plan:
        """The same with the strengths of all LoRAs multiplied."""
        if factor == 1:
            return self
        passes = tuple(
            replace(each, weights={n: _times(w, factor) for n, w in each.weights.items()})
            for each in self.passes
        )
        return replace(self, passes=passes)


def _times(strength: Strength, factor: float) -> Strength:
    if isinstance(strength, tuple):
        return tuple((pattern, value * factor) for pattern, value in strength)
    return strength * factor


class Policy(Protocol):
    """When cached features are refreshed: a pure function of the number of steps."""

    @property
    def name(self) -> str:
        """Text that `cmlora.caching.policy.parse` turns back into the same policy."""

    @property
    def reuse(self) -> bool:
        """False if nothing is ever reused (every pass of every step is full)."""

    def refreshes(self, count: int) -> tuple[int, ...]:
        """The indices of the refresh steps among 0 .. count - 1, ascending, starting with 0.

        A policy that decides while it runs gives those that are certain beforehand, and has
        ``given(changes, count)`` beside this; see `cmlora.caching.policy.Threshold`.
        """


class Strategy(Protocol):
    """The signature every composition method has: options are its own keyword arguments."""

    # with both *args and **options a type checker takes any further parameters for a match
    def __call__(
        self, step: Step, members: Sequence[Member], policy: Policy, *args: Any, **options: Any
    ) -> Plan: ...
