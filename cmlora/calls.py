"""One call of a denoiser, and what the features of its passes are kept under."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from diffusers.hooks.hooks import CacheContext
    from torch import nn

    from cmlora.guided import Guidance
    from cmlora.plan import Plan
    from cmlora.tracker import Tick


class Slot(NamedTuple):
    """Where a pass's features are kept; two passes never have the same one.

    Args:
        loras: the LoRAs of the pass, sorted; the base model has none.
        ordinal: tells apart passes with the same LoRAs.
        branch: of guidance, where the pipeline calls the denoiser once per branch.
        shape: of the denoiser's input: a feature fits no other.
    """

    loras: tuple[str, ...]
    ordinal: int
    branch: str
    shape: tuple[int, ...]

    @property
    def context(self) -> str:
        """A name for diffusers' cache context."""
        return f"{self.branch}/{self.loras!r}#{self.ordinal}/{'x'.join(map(str, self.shape))}"


class Call(NamedTuple):
    """One call of the denoiser by the pipeline.

    Args:
        args: as the pipeline gives them.
        kwargs: as the pipeline gives them.
        tick: where the run is.
        context: the cache context the pipeline set, if it sets one.
        sample: what goes in, if it is one tensor.
        guidance: which of its branches this call holds.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tick: Tick
    context: CacheContext | None
    sample: torch.Tensor | None
    guidance: Guidance


def slots_of(plan: Plan, call: Call) -> list[Slot]:
    """A slot per pass, never the same twice."""
    seen: Counter[tuple[str, ...]] = Counter()
    slots = []
    for single in plan.passes:
        loras, shape = tuple(sorted(single.weights)), _shape(call)
        if call.guidance.side == "both" and single.branch != "both":
            shape = (shape[0] // 2, *shape[1:])
        slots.append(Slot(loras, seen[loras], call.tick.branch, shape))
        seen[loras] += 1
    return slots


def whole(slots: Sequence[Slot], call: Call) -> list[Slot]:
    """What the passes' outputs are kept under: they are whole, whatever part of a pass was run."""
    return [slot._replace(shape=_shape(call)) for slot in slots]


def _shape(call: Call) -> tuple[int, ...]:
    return () if call.sample is None else tuple(call.sample.shape)


class Signature:
    """A denoiser's arguments by name, however it is called.

    Args:
        module: the denoiser.
    """

    def __init__(self, module: nn.Module) -> None:
        names = inspect.signature(module.forward).parameters
        self._positions = {name: position for position, name in enumerate(names)}

    def named(self, call: Call) -> dict[str, Any]:
        """All arguments of a call."""
        return {**dict(zip(self._positions, call.args, strict=False)), **call.kwargs}

    def find(self, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """An argument under whichever of the names it has there."""
        for name in names:
            if name in kwargs:
                return kwargs[name]
            position = self._positions.get(name)
            if position is not None and position < len(args):
                return args[position]
        return None


def own(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments a pass may change: UNets take residuals from the lists they are given."""
    return {n: v.copy() if isinstance(v, list | dict) else v for n, v in kwargs.items()}


def without_scale(kwargs: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """The scale of all LoRAs that a call asks for, and its arguments without it.

    >>> without_scale({"t": 1, "joint_attention_kwargs": {"scale": 0.5}})
    (0.5, {'t': 1, 'joint_attention_kwargs': {}})
    """
    scale, rest = 1.0, dict(kwargs)
    for name, held in kwargs.items():
        if name.endswith("attention_kwargs") and isinstance(held, Mapping) and "scale" in held:
            scale *= float(held["scale"])
            rest[name] = {key: value for key, value in held.items() if key != "scale"}
    return scale, rest
