"""Which slots are renewed at a refresh, and what the others do: additions to any cache policy.

``uniform:2+turns+age:0.2+forecast:1`` refreshes every second step, at each of them one slot in
turn, besides every slot that has become older than a fifth of the run, and what is reused in
between is forecast from the last two values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from cmlora.errors import CmloraError
from cmlora.plan import Policy, Step
from cmlora.registry import Entry, Registry


@dataclass(frozen=True)
class Modified:
    """A cache policy with additions.

    Args:
        base: says which steps are refresh steps.
        turns: at a refresh step only one slot is renewed, the next in turn; CMLoRA renews the
            dominant LoRA's in any case.
        age: a slot as old as this fraction of the run is renewed at any step; ``None``: never.
        forecast: degree of the polynomial by which a reused feature is forecast
            (`cmlora.caching.forecast.forecast`); 0 takes the last one as it is.
    """

    base: Policy
    turns: bool = False
    age: float | None = None
    forecast: int = 0

    @property
    def name(self) -> str:
        """The text `cmlora.caching.policy.parse` understands."""
        parts = [self.base.name]
        parts += ["turns"] if self.turns else []
        parts += [] if self.age is None else [f"age:{self.age!r}"]
        parts += [f"forecast:{self.forecast}"] if self.forecast else []
        return "+".join(parts)

    @property
    def reuse(self) -> bool:
        """Whether the base policy ever reuses anything."""
        return self.base.reuse

    @property
    def adaptive(self) -> bool:
        """Whether the base policy decides by measurements."""
        return bool(getattr(self.base, "adaptive", False))

    def given(self, changes: Sequence[float]) -> Modified:
        """The policy when the changes of the first steps are known."""
        return replace(self, base=self.base.given(changes))  # type: ignore[attr-defined]

    def refreshes(self, count: int) -> tuple[int, ...]:
        """Those of the base policy."""
        return self.base.refreshes(count)


def turns(policy: Modified) -> Modified:
    """At a refresh step one slot after another, not all of them."""
    return replace(policy, turns=True)


def age(policy: Modified, fraction: float = 0.2) -> Modified:
    """No slot is used that is older than a fraction of the run.

    Raises:
        CmloraError: if it is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise CmloraError(f"cache policy age: {fraction} of a run; write age:0.2 for one fifth")
    return replace(policy, age=float(fraction))


def forecast(policy: Modified, order: int = 1) -> Modified:
    """What is reused is forecast from the last ``order + 1`` values.

    Raises:
        CmloraError: if the order is not 1, 2 or 3.
    """
    if order not in (1, 2, 3) or not isinstance(order, int):
        raise CmloraError(f"cache policy forecast: order {order}; write forecast:1, :2 or :3")
    return replace(policy, forecast=order)


MODIFIERS: Registry[Any] = Registry(
    "addition to a cache policy",
    Entry("turns", turns, "one slot per refresh, in turn"),
    Entry("age", age, "a slot older than a fraction of the run is renewed"),
    Entry(
        "forecast",
        forecast,
        "reused features are extrapolated from their last values",
        "arXiv:2503.06923",
    ),
)


def modified(base: Policy, texts: Sequence[str]) -> Policy:
    """A policy with additions, each as ``name`` or ``name:number``.

    Raises:
        CmloraError: for an unknown or repeated addition, or a value it cannot have.
    """
    result = Modified(base)
    seen: set[str] = set()
    for text in texts:
        name, colon, number = text.strip().partition(":")
        add = MODIFIERS[name].object
        if name in seen:
            raise CmloraError(f"cache policy: {name} is given twice")
        seen.add(name)
        try:
            values = [_number(number)] if colon else []
            result = add(result, *values)
        except CmloraError:
            raise
        except (TypeError, ValueError):
            raise CmloraError(
                f"cache policy {base.name}+{text.strip()}: not like {_USAGE}"
            ) from None
    return result


_USAGE = "uniform:2+turns+age:0.2+forecast:1"


def refresh_steps(policy: Policy, step: Step) -> tuple[int, ...]:
    """The refresh steps of a run as far as they are known at a step."""
    if getattr(policy, "adaptive", False) and step.changes:
        policy = policy.given(step.changes)  # type: ignore[attr-defined]
    return policy.refreshes(step.count)


def renewed(policy: Policy, step: Step, slots: int) -> tuple[bool, ...]:
    """Which of a plan's slots, in the order of its passes, are computed in full at a step.

    Args:
        policy: any policy.
        step: the step about to run.
        slots: how many there are; the same at every step of a run.
    """
    if not policy.reuse:
        return (True,) * slots
    fraction = getattr(policy, "age", None)
    return in_turn(
        refresh_steps(policy, step),
        step.index,
        slots,
        bool(getattr(policy, "turns", False)),
        None if fraction is None else max(1, math.ceil(fraction * step.count - 1e-9)),
    )


@lru_cache(maxsize=4096)
def in_turn(
    refreshes: tuple[int, ...], index: int, slots: int, one: bool = True, oldest: int | None = None
) -> tuple[bool, ...]:
    """Which of some slots are renewed at a step, if all are at step 0.

    Args:
        refreshes: the refresh steps.
        index: the step.
        slots: how many there are.
        one: whether a refresh renews one slot after another, or all of them.
        oldest: a slot that is so many steps old is renewed at any step.
    """
    at = [0] * slots
    turn, due, now = 0, set(refreshes), (True,) * slots
    for step in range(1, index + 1):
        chosen = set()
        if step in due:
            chosen = {turn % slots} if one else set(range(slots))
            turn += 1
        if oldest is not None:
            chosen |= {slot for slot in range(slots) if step - at[slot] >= oldest}
        for slot in chosen:
            at[slot] = step
        now = tuple(slot in chosen for slot in range(slots))
    return now


def _number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        return float(text)
