"""How several LoRAs become one picture: the methods, each a pure function of step and LoRAs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmlora.caching.policy import parse
from cmlora.errors import CmloraError
from cmlora.plan import Member, Plan, Policy, Step, Strategy
from cmlora.registry import Entry, Registry
from cmlora.schedules.apply import scheduled
from cmlora.schedules.schedule import Schedule
from cmlora.strategies.auto import auto
from cmlora.strategies.cmlora import cmlora
from cmlora.strategies.composite import composite
from cmlora.strategies.delta import delta
from cmlora.strategies.freeswitch import freeswitch
from cmlora.strategies.gate import gate
from cmlora.strategies.klora import klora
from cmlora.strategies.lorahub import lorahub
from cmlora.strategies.loratorio import loratorio
from cmlora.strategies.merge import merge
from cmlora.strategies.multlfg import multlfg
from cmlora.strategies.naive import naive
from cmlora.strategies.options import checked
from cmlora.strategies.select import select
from cmlora.strategies.switch import switch
from cmlora.strategies.switch_a import switch_a
from cmlora.strategies.w_composite import w_composite
from cmlora.strategies.w_switch import w_switch

METHODS: Registry[Strategy] = Registry(
    "composition method",
    Entry("naive", naive, "no LoRA, the trigger words alone"),
    Entry("merge", merge, "all LoRAs at once in the weights"),
    Entry("switch", switch, "one LoRA at a time, the next one every tau steps", "arXiv:2402.16843"),
    Entry("composite", composite, "the mean of one prediction per LoRA", "arXiv:2402.16843"),
    Entry(
        "switch_a",
        switch_a,
        "one LoRA at a time, high-frequency ones first",
        "arXiv:2502.04923",
    ),
    Entry(
        "w_switch",
        w_switch,
        "one LoRA at a time, longer the more the prompt speaks of it",
        "arXiv:2606.03792",
    ),
    Entry(
        "w_composite",
        w_composite,
        "the mean of the predictions, weighed by the prompt",
        "arXiv:2606.03792",
    ),
    Entry(
        "freeswitch",
        freeswitch,
        "at every step the LoRA to which it matters most, by measured profiles",
        "arXiv:2604.10023",
    ),
    Entry(
        "klora",
        klora,
        "one pass in which every layer has either subject or style",
        "arXiv:2502.18461",
    ),
    Entry("gate", gate, "one pass in which the LoRAs share the places of every layer"),
    Entry("select", select, "every place follows the LoRAs that change it most"),
    Entry(
        "delta",
        delta,
        "one fresh prediction per step, the others follow at their last known distance",
    ),
    Entry(
        "loratorio",
        loratorio,
        "every patch follows the LoRAs least like the base model there",
        "arXiv:2508.11624",
    ),
    Entry(
        "multlfg",
        multlfg,
        "every frequency band follows the LoRAs that change it most",
        "arXiv:2505.20525",
    ),
    Entry("lorahub", lorahub, "one merge with searched coefficients", "arXiv:2307.13269"),
    Entry(
        "cmlora",
        cmlora,
        "every LoRA predicts, in frequency order one dominates, the others reuse features",
        "arXiv:2502.04923",
    ),
    Entry("auto", auto, "chooses one of the others by what is known of the LoRAs and a budget"),
)


def check_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method, checked against its keyword arguments and read from text.

    Raises:
        CmloraError: for an unknown method or option, or a value of the wrong kind or range.

    >>> check_options("switch", {"tau": "3"})
    {'tau': 3}
    """
    return checked(method, METHODS[method].object, options)


def schedule(
    method: str,
    members: Sequence[Member],
    count: int,
    policy: str | Policy = "none",
    **options: Any,
) -> tuple[Plan, ...]:
    """The plans of all steps of a run without a model: for inspection, cost and tests.

    What a method measures while it runs is missing here; CMLoRA online then follows the clock.
    `cmlora.caching.policy.tally` counts the full and light calls.

    Args:
        method: a key of `METHODS`.
        members: the LoRAs in the user's order.
        count: T, the number of steps.
        policy: the cache policy or its text.
        options: the method's own.

    Raises:
        CmloraError: for anything the method or the policy does not accept.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise CmloraError(f"a run has {count!r} steps; the number must be 1 or more")
    strategy, known = METHODS[method].object, check_options(method, options)
    refreshing, acting = parse(policy), scheduled(strategy, Schedule())
    return tuple(acting(Step(i, count), members, refreshing, **known) for i in range(count))
