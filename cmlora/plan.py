"""The vocabulary of every composition method: what is known at a step, and what to run.

A strategy is a pure function ``(step, members, policy, **options) -> Plan``. It never sees the
model; the engine carries its plan out around any denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["high", "low"]


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
    """

    name: str
    weight: float = 1.0
    role: Role | None = None
    frequency: float | None = None
    window: tuple[float, float] | None = None
    category: str | None = None
    triggers: tuple[str, ...] = ()


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
    """

    index: int
    count: int
    timestep: float = 0.0
    sample: Tensor | None = field(default=None, compare=False, repr=False)
    observed: tuple[Mapping[str, float], ...] = ()

    @property
    def fraction(self) -> float:
        """Progress through the run, 0 at the first step, always below 1."""
        return self.index / self.count


@dataclass(frozen=True)
class Pass:
    """One call of the denoiser.

    Args:
        weights: strength of every LoRA that is active; empty is the base model alone.
        may_reuse: run only the shallow branch if this pass's cache slot holds a feature;
            otherwise (or if the slot is empty) run in full and record.
    """

    weights: Mapping[str, float]
    may_reuse: bool = False

    @property
    def key(self) -> str:
        """Name of the cache slot and of the row in reports: LoRA names, or ``base``."""
        return "+".join(sorted(self.weights)) or "base"


Combine = Callable[["Tensor"], "Tensor"]
"""Stacked raw outputs (P, B, C, H, W), in the order of the passes, to one output (B, C, H, W)."""

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

    Raises:
        ValueError: if there is no pass, or shares do not match the passes or do not sum to 1.
    """

    passes: tuple[Pass, ...]
    combine: tuple[float, ...] | Combine = (1.0,)
    observe: Observe | None = None

    def __post_init__(self) -> None:
        if not self.passes:
            raise ValueError("a plan needs at least one pass")
        if isinstance(self.combine, tuple):
            if len(self.combine) != len(self.passes):
                raise ValueError(f"{len(self.combine)} shares for {len(self.passes)} passes")
            if abs(sum(self.combine) - 1.0) > 1e-6:
                raise ValueError(f"shares {self.combine} sum to {sum(self.combine)}, not 1")


class Policy(Protocol):
    """When cached features are refreshed: a pure function of the number of steps."""

    @property
    def name(self) -> str:
        """Text that `cmlora.caching.policy.parse` turns back into the same policy."""

    @property
    def reuse(self) -> bool:
        """False if nothing is ever reused (every pass of every step is full)."""

    def refreshes(self, count: int) -> tuple[int, ...]:
        """The indices of the refresh steps among 0 .. count - 1, ascending, starting with 0."""


class Strategy(Protocol):
    """The signature every composition method has: options are its own keyword arguments."""

    # with both *args and **options a type checker takes any further parameters for a match
    def __call__(
        self, step: Step, members: Sequence[Member], policy: Policy, *args: Any, **options: Any
    ) -> Plan: ...
