"""A schedule on any composition method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cmlora.caching.modifiers import renewed
from cmlora.plan import Member, Pass, Plan, Policy, Step, Strategy
from cmlora.schedules.schedule import Schedule, product, silent

_ONE_EACH = ("coefficients",)
"""Options with one value per LoRA sorted by name."""


def scheduled(strategy: Strategy, schedule: Schedule) -> Strategy:
    """The strategy with every LoRA's weight multiplied by its curve at the step about to run.

    A LoRA whose strength is 0 everywhere at a step, by its curve or its weight, takes no part in
    it: others have its turn and its share. If none is left, the base model runs alone.

    Args:
        strategy: any.
        schedule: curves of some or all of the LoRAs, or none.
    """

    def run(
        step: Step, members: Sequence[Member], policy: Policy, *args: Any, **options: Any
    ) -> Plan:
        factors = {member.name: schedule.factor(member.name, step) for member in members}
        active = [m for m in members if m.weight != 0 and not silent(factors[m.name])]
        if members and not active:
            return Plan((Pass({}, not renewed(policy, step, 1)[0]),))
        for name in _ONE_EACH:
            if options.get(name) is not None and len(active) < len(members):
                options[name] = _restricted(options[name], members, active)
        plan = strategy(step, active, policy, *args, **options)
        if not schedule.tracks:
            return plan
        passes = tuple(
            replace(
                item,
                weights={name: product(w, factors[name]) for name, w in item.weights.items()},
            )
            for item in plan.passes
        )
        return replace(plan, passes=passes)

    return run


def _restricted(
    values: Sequence[Any], members: Sequence[Member], active: Sequence[Member]
) -> tuple[Any, ...]:
    """The values of the active LoRAs among those of all."""
    names = sorted(member.name for member in members)
    if len(values) != len(names):
        return tuple(values)  # the method says what is wrong
    known = dict(zip(names, values, strict=True))
    return tuple(known[name] for name in sorted(member.name for member in active))
