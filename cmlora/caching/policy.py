"""When a cached feature is computed afresh: pure functions of the number of steps.

A policy knows neither model nor LoRAs. It answers two questions: is anything ever reused, and
which of the T denoising steps are refresh steps. What happens at a refresh step is the strategy's
affair: most of them refresh every pass, CMLoRA refreshes the dominant LoRA. A policy may say more
in `cmlora.caching.modifiers`: one slot per refresh in turn, a maximum age, forecasts for reuse.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

from cmlora.errors import CmloraError
from cmlora.plan import Plan, Policy, Strength, alike
from cmlora.registry import Entry, Registry


@dataclass(frozen=True)
class NoReuse:
    """Every pass of every step is full."""

    @property
    def name(self) -> str:
        """The text `parse` understands."""
        return "none"

    @property
    def reuse(self) -> bool:
        """Always false."""
        return False

    def refreshes(self, count: int) -> tuple[int, ...]:
        """All steps."""
        return tuple(range(count))


@dataclass(frozen=True)
class Uniform:
    """A refresh every ``interval`` steps, as in DeepCache (arXiv 2312.00858)."""

    interval: int

    def __post_init__(self) -> None:
        _check_interval("uniform", self.interval)

    @property
    def name(self) -> str:
        """The text `parse` understands."""
        return f"uniform:{self.interval}"

    @property
    def reuse(self) -> bool:
        """False for interval 1, where every step is a refresh step."""
        return self.interval > 1

    def refreshes(self, count: int) -> tuple[int, ...]:
        """0, n, 2n, ... below ``count``."""
        return tuple(range(0, count, self.interval))


@dataclass(frozen=True)
class NonUniform:
    """CMLoRA's intervals (arXiv 2502.04923): short at both ends of a run, long in the middle.

    Features change fastest in the first and in the last part of denoising.

    Args:
        c1: interval before ``start`` and from ``end`` on.
        c2: interval between them.
        start: where the middle part begins, as a fraction of the steps.
        end: where it ends.
    """

    c1: int = 2
    c2: int = 3
    start: float = 0.375
    end: float = 0.875

    def __post_init__(self) -> None:
        _check_interval("nonuniform", self.c1)
        _check_interval("nonuniform", self.c2)
        if not 0 <= self.start <= self.end <= 1:
            raise CmloraError(
                f"cache policy nonuniform: the middle part is {self.start} to {self.end}; "
                "both are fractions of the steps with 0 <= start <= end <= 1"
            )

    @property
    def name(self) -> str:
        """The text `parse` understands."""
        if self == NonUniform():
            return "nonuniform"
        return f"nonuniform:{self.c1},{self.c2},{self.start!r},{self.end!r}"

    @property
    def reuse(self) -> bool:
        """False only if both intervals are 1."""
        return max(self.c1, self.c2) > 1

    def refreshes(self, count: int) -> tuple[int, ...]:
        """F = {0, c1, .. < floor(start T)}, {floor(start T), + c2, .. < floor(end T)}, {.., + c1}.

        >>> [len(NonUniform().refreshes(count)) for count in (100, 200, 220)]
        [43, 85, 92]
        """
        # 0.29 * 100 is 28.999..., and 29 is meant
        start, end = (math.floor(edge * count + 1e-9) for edge in (self.start, self.end))
        return tuple(
            chain(range(0, start, self.c1), range(start, end, self.c2), range(end, count, self.c1))
        )


@dataclass(frozen=True)
class Custom:
    """A refresh at the listed steps, and always at step 0; steps past the end of a run are idle."""

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        wrong = [step for step in self.steps if isinstance(step, bool) or not isinstance(step, int)]
        if wrong or min(self.steps, default=0) < 0:
            raise CmloraError(
                f"cache policy steps: {list(self.steps)} must be step numbers counted from 0"
            )
        object.__setattr__(self, "steps", tuple(sorted({0, *self.steps})))

    @property
    def name(self) -> str:
        """The text `parse` understands."""
        return "steps:" + ",".join(map(str, self.steps))

    @property
    def reuse(self) -> bool:
        """Always true."""
        return True

    def refreshes(self, count: int) -> tuple[int, ...]:
        """The listed steps below ``count``."""
        return tuple(step for step in self.steps if step < count)


@dataclass(frozen=True)
class Threshold:
    """A refresh when the denoiser's input has changed by so much since the last one.

    The account of TeaCache (arXiv 2411.19108): the relative L1 change from step to step,
    |x_t - x_(t-1)| / |x_(t-1)|, is mapped by a polynomial fitted to the model and accumulated; at
    ``limit`` or above the step is a refresh step and the account starts again from 0. TeaCache
    measures the first block's input after its modulation by the timestep; here x is the latent,
    which is the same for all LoRAs and branches and known before anything has run, so the paper's
    coefficients do not apply.

    Args:
        limit: where a refresh is due.
        coefficients: of the polynomial, from the constant upwards; the identity unless given.
        changes: what was measured in the run so far; see `given`.
    """

    limit: float
    coefficients: tuple[float, ...] = (0.0, 1.0)
    changes: tuple[float, ...] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        numbers = (self.limit, *self.coefficients)
        if not self.coefficients or not all(map(math.isfinite, numbers)) or self.limit < 0:
            raise CmloraError(
                f"cache policy threshold: {', '.join(map(str, numbers))}; the limit must be 0 or "
                "more and the coefficients finite numbers"
            )

    @property
    def name(self) -> str:
        """The text `parse` understands."""
        if self.coefficients == (0.0, 1.0):
            return f"threshold:{self.limit!r}"
        return f"threshold:{','.join(map(repr, (self.limit, *self.coefficients)))}"

    @property
    def reuse(self) -> bool:
        """False for limit 0, which every step reaches."""
        return self.limit > 0

    @property
    def adaptive(self) -> bool:
        """Always true: the engine has to measure the input's changes."""
        return True

    def given(self, changes: Sequence[float]) -> Threshold:
        """The policy when the changes of the first steps, the first of them 0, are known."""
        return replace(self, changes=tuple(changes))

    def refreshes(self, count: int) -> tuple[int, ...]:
        """Step 0, and the steps so far at which the account was full.

        Without measurements the account is taken to fill in proportion to the run's length: the
        input goes from noise to picture, a relative change of about 1 in all. That is a forecast
        for cost estimates.
        """
        if not self.reuse:
            return tuple(range(count))
        changes = self.changes
        if changes is None:
            changes = (0.0, *(1 / count for _ in range(count - 1)))
        found, account = [0], 0.0
        for step in range(1, min(count, len(changes))):
            powers = (c * changes[step] ** i for i, c in enumerate(self.coefficients))
            account += math.fsum(powers)
            if not account < self.limit:  # not a number is no reason to go on reusing
                found.append(step)
                account = 0.0
        return tuple(found)


def none() -> Policy:
    """Nothing is reused."""
    return NoReuse()


def uniform(n: int) -> Policy:
    """A refresh every ``n`` steps; ``uniform(1)`` reuses nothing.

    Raises:
        CmloraError: if ``n`` is not a positive whole number.
    """
    return Uniform(n)


def nonuniform(c1: int = 2, c2: int = 3, start: float = 0.375, end: float = 0.875) -> Policy:
    """CMLoRA's rule: every ``c1`` steps, but every ``c2`` in the middle part of the run.

    Raises:
        CmloraError: if an interval is not a positive whole number, or the fractions are not
            ``0 <= start <= end <= 1``.
    """
    return NonUniform(c1, c2, start, end)


def custom(steps: Iterable[int]) -> Policy:
    """A refresh at the given steps (and at step 0).

    Raises:
        CmloraError: if a step is negative or not a whole number.
    """
    return Custom(tuple(steps))


def threshold(limit: float = 0.1, *coefficients: float) -> Policy:
    """A refresh when the input has changed by ``limit`` since the last one.

    Args:
        limit: accumulated relative change, 0 or more.
        coefficients: of a polynomial the changes are mapped by, from the constant upwards.

    Raises:
        CmloraError: if a number is not finite or the limit negative.
    """
    return Threshold(float(limit), tuple(map(float, coefficients)) or (0.0, 1.0))


POLICIES: Registry[Callable[..., Policy]] = Registry(
    "cache policy",
    Entry("none", none, "every pass is full"),
    Entry("uniform", uniform, "a refresh every n steps", "arXiv:2312.00858"),
    Entry(
        "nonuniform",
        nonuniform,
        "a refresh every 2 steps, every 3 in the middle of the run",
        "arXiv:2502.04923",
    ),
    Entry("steps", custom, "a refresh at the listed steps"),
    Entry(
        "threshold",
        threshold,
        "a refresh when the input has changed enough since the last",
        "arXiv:2411.19108",
    ),
)

_USAGE = {
    "none": "none",
    "uniform": "uniform:3",
    "nonuniform": "nonuniform or nonuniform:2,3,0.375,0.875",
    "steps": "steps:0,5,9",
    "threshold": "threshold:0.1",
}


def parse(text: str | Policy) -> Policy:
    """The policy a text stands for; a policy passes through.

    Args:
        text: ``none``, ``uniform:3``, ``nonuniform``, ``nonuniform:2,3,0.375,0.875``,
            ``steps:0,5,9`` or ``threshold:0.1``, and after it any of ``+turns``, ``+age:0.2`` and
            ``+forecast:1``, see `cmlora.caching.modifiers`. ``parse(policy.name) == policy`` for
            every policy here.

    Raises:
        CmloraError: for an unknown name, arguments that are not numbers of the right kind, or what
            is neither text nor policy.

    >>> parse("uniform:3").refreshes(8)
    (0, 3, 6)
    """
    if not isinstance(text, str):
        if not hasattr(text, "refreshes"):
            raise CmloraError(
                f"cache {text!r}: expected a text such as uniform:3, a policy, or the "
                "configuration of one of diffusers' caches"
            )
        return text
    # a plus sign in front of a digit is one of a number, as in 1e+05
    text, *extras = re.split(r"\+(?!\d)", text)
    if extras:
        from cmlora.caching.modifiers import modified

        return modified(parse(text), extras)
    name, colon, rest = text.strip().partition(":")
    factory = POLICIES[name.strip()].object
    try:
        values = [_number(part) for part in rest.split(",")] if colon else []
        return factory(values) if name == "steps" else factory(*values)
    except CmloraError:
        raise
    except (TypeError, ValueError):
        raise CmloraError(f"cache policy {text!r}: write {_USAGE[name]}") from None


class Tally(NamedTuple):
    """How often each pass ran: mappings from `cmlora.plan.Pass.key` to a number of calls."""

    full: Mapping[str, float]
    light: Mapping[str, float]


def tally(plans: Sequence[Plan]) -> Tally:
    """Full and light calls of a whole run, with one cache slot per pass as the engine keeps them.

    A pass that may reuse is light only if an earlier step has filled its slot, with about the same
    strengths, and it has run at every step since: the first step of every turn is full whatever the
    policy says. A call on one branch of guidance counts one half, and has a slot of its own. A
    recalled pass is no call if its output was kept at the step before.
    """
    full: Counter[str] = Counter()
    light: Counter[str] = Counter()
    kept: frozenset[str] = frozenset()
    recorded: dict[Hashable, Mapping[str, Strength]] = {}
    for plan in plans:
        before, recorded = recorded, {}
        seen: Counter[str] = Counter()
        for item in plan.passes:
            slot = item.key, seen[item.key], item.branch == "both"
            seen[item.key] += 1
            if item.recall and {item.key, plan.passes[0].key} <= kept:
                continue
            share: Any = 1 if item.branch == "both" else 0.5
            known = before.get(slot)
            reused = item.may_reuse and known is not None and alike(item.weights, known)
            (light if reused else full)[item.key] += share
            recorded[slot] = known if reused and known is not None else item.weights
        kept = frozenset(item.key for item in plan.passes) if plan.keep else frozenset()
    return Tally(dict(+full), dict(light))


def _number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _check_interval(policy: str, interval: int) -> None:
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise CmloraError(
            f"cache policy {policy}: interval {interval!r} must be a whole number of steps, "
            "1 or more (1 reuses nothing)"
        )
