"""What a method would do with these LoRAs, before anything is rendered."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cmlora import container
from cmlora.adapters.analysis.doctor import Report as Diagnosis
from cmlora.adapters.analysis.doctor import examine
from cmlora.caching.policy import parse, tally
from cmlora.errors import CmloraError
from cmlora.files import read
from cmlora.frequency.card import Profile
from cmlora.pipelines import library
from cmlora.plan import Member, Plan, Step
from cmlora.schedules.apply import scheduled
from cmlora.schedules.parse import parse_schedule
from cmlora.strategies import METHODS, check_options, schedule
from cmlora.ui.actions import complete
from cmlora.ui.order import Order
from cmlora.ui.studio import Studio, without_path

FULL, LIGHT, REMEMBERED = "full", "light", "remembered"


@dataclass(frozen=True)
class Moment:
    """What one pass key does at one step.

    Args:
        full: full calls; one on one branch of guidance is a half.
        light: calls that reuse features, likewise. None of both: an output is remembered.
        share: of its output in the result; ``None`` if that is decided while it runs.
    """

    full: float
    light: float
    share: float | None

    @property
    def kind(self) -> str:
        """``full``, ``light`` or ``remembered``."""
        return FULL if self.full else LIGHT if self.light else REMEMBERED


@dataclass(frozen=True)
class Timeline:
    """A run as it is planned.

    Args:
        steps: denoising steps.
        names: of the LoRAs, in the order of the selection.
        passes: per pass key and step what it does, or ``None``.
        dominant: per step the pass key with the largest share; empty if there is none.
        strengths: per LoRA and step its effective strength: shares times strengths, summed.
        open: whether the method decides something only while it runs.
    """

    steps: int
    names: tuple[str, ...]
    passes: Mapping[str, tuple[Moment | None, ...]]
    dominant: tuple[str, ...]
    strengths: Mapping[str, tuple[float, ...]]
    open: bool

    @property
    def full(self) -> float:
        """Full passes of the run."""
        return sum(moment.full for moment in self._moments())

    @property
    def light(self) -> float:
        """Passes that reuse features."""
        return sum(moment.light for moment in self._moments())

    def _moments(self) -> list[Moment]:
        return [moment for row in self.passes.values() for moment in row if moment is not None]


def default_policy(order: Order) -> str:
    """The cache policy an order is carried out with on a UNet."""
    return order.cache or ("nonuniform" if order.method == "cmlora" else "none")


def members(studio: Studio, order: Order) -> tuple[Member, ...]:
    """The LoRAs as a method will see them: from their files' headers and profile cards.

    Raises:
        CmloraError: if a file is not there or broken.
    """
    found: dict[str, Member] = {}
    for name in sorted(order.loras):
        path = studio.lora_path(name, order.model)
        adapter = library.adapter_name(path, found)
        try:
            head = container.header(path)
        except CmloraError as error:
            raise CmloraError(without_path(str(error), path)) from None
        profile = studio.profile(path)
        member = Member(
            adapter,
            order.loras[name],
            category=head.metadata.get("cmlora.category"),
            scope=order.scopes.get(name),
        )
        if profile is not None and math.isfinite(profile.frequency):
            member = replace(member, frequency=profile.frequency, window=profile.window)
        found[adapter] = member
    return tuple(found.values())


def plans(studio: Studio, order: Order) -> tuple[Plan, ...]:
    """The plans of every step of an order, without a model.

    Raises:
        CmloraError: if the order cannot be fulfilled.
    """
    order = complete(studio, order)
    options = dict(order.options)
    if order.method == "lorahub" and "coefficients" not in options:
        options["coefficients"] = (1.0,) * len(order.loras)
    chosen, policy = members(studio, order), default_policy(order)
    if not order.schedule:
        return schedule(order.method, chosen, order.steps, policy, **options)
    curves = parse_schedule(order.schedule)
    curves.check([member.name for member in chosen])
    strategy = scheduled(METHODS[order.method].object, curves)
    known = check_options(order.method, options)
    count, refreshing = order.steps, parse(policy)
    return tuple(strategy(Step(i, count), chosen, refreshing, **known) for i in range(count))


def timeline(studio: Studio, order: Order) -> Timeline:
    """How an order would be carried out.

    Raises:
        CmloraError: if the order cannot be fulfilled.
    """
    found = plans(studio, order)
    return read_plans(found, [m.name for m in members(studio, order)], default_policy(order))


def read_plans(found: Sequence[Plan], names: Sequence[str], policy: str) -> Timeline:
    """The timeline of plans.

    Args:
        found: one per step.
        names: of the LoRAs.
        policy: text of the cache policy.
    """
    reuses = parse(policy).reuse
    rows: dict[str, list[Moment | None]] = {}
    strengths: dict[str, list[float]] = {name: [] for name in names}
    dominant = []
    undecided = False
    before = tally(())
    for index, plan in enumerate(found):
        decided = isinstance(plan.combine, tuple) and plan.compare is None
        undecided |= not decided
        now = tally(found[: index + 1])  # what it adds to the step before is this step's calls
        effective = dict.fromkeys(names, 0.0)
        shares: dict[str, float] = {}
        for place, single in enumerate(plan.passes):
            share = plan.combine[place] if isinstance(plan.combine, tuple) and decided else None
            shares[single.key] = shares.get(single.key, 0.0) + (share or 0.0)
            for name, weight in single.weights.items():
                if name in effective and share is not None:
                    effective[name] += share * _mean(weight)
        for key, total in shares.items():
            full = now.full.get(key, 0) - before.full.get(key, 0)
            light = now.light.get(key, 0) - before.light.get(key, 0)
            if not reuses:
                full, light = full + light, 0
            row = rows.setdefault(key, [])
            row.extend([None] * (index - len(row)))
            row.append(Moment(full, light, total if decided else None))
        before = now
        best = max(shares, key=lambda key: shares[key])
        clear = sum(value > shares[best] - 1e-9 for value in shares.values()) == 1
        dominant.append(best if clear and decided else "")
        for name in names:
            strengths[name].append(effective[name])
    for row in rows.values():
        row.extend([None] * (len(found) - len(row)))
    return Timeline(
        len(found),
        tuple(names),
        {key: tuple(row) for key, row in rows.items()},
        tuple(dominant),
        {name: tuple(values) for name, values in strengths.items()},
        undecided,
    )


def _mean(weight: Any) -> float:
    """One number for a strength that may differ from block to block."""
    if isinstance(weight, int | float):
        return float(weight)
    try:
        values = [float(value) for value in dict(weight).values()]
    except (TypeError, ValueError):
        return 1.0
    return math.fsum(values) / len(values) if values else 1.0


def profiles(studio: Studio, order: Order) -> dict[str, Profile]:
    """The frequency profiles that are known for an order's LoRAs, by name."""
    found = {}
    for name in order.loras:
        profile = studio.profile(studio.lora_path(name, order.model))
        if profile is not None:
            found[name] = profile
    return found


def diagnosis(studio: Studio, order: Order) -> Diagnosis:
    """What the doctor says about an order's LoRAs, from their files alone.

    Raises:
        CmloraError: if no LoRA is selected, or a file cannot be read or does not fit the others.
    """
    if not order.loras:
        raise CmloraError("no LoRA is selected; select two or more to see how they get along")
    paths: dict[str, Path] = {}
    for name in order.loras:
        path = studio.lora_path(name, order.model)
        paths[library.adapter_name(path, paths)] = path
    found = []
    for name, path in paths.items():
        try:
            found.append(replace(read(path), name=name))
        except CmloraError as error:
            raise CmloraError(without_path(str(error), path)) from None
    known = {name: studio.profile(path) for name, path in paths.items()}
    frequency = {name: p.frequency for name, p in known.items() if p is not None}
    return examine(found, None, frequency)
