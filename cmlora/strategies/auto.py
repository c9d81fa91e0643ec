"""Chooses method, order, weights and cache for a set of LoRAs, and says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from cmlora.branches import Uncond
from cmlora.frequency.order import phases, single_phase
from cmlora.plan import Member, Plan, Policy, Step, Strategy
from cmlora.strategies._passes import by_name
from cmlora.strategies.delta import delta
from cmlora.strategies.freeswitch import freeswitch
from cmlora.strategies.gate import gate
from cmlora.strategies.merge import merge
from cmlora.strategies.options import Between
from cmlora.strategies.select import select
from cmlora.strategies.switch import switch

if TYPE_CHECKING:
    from cmlora.updates import Updates

LIGHT = 0.38
"""Cost of a light pass in full ones: Stable Diffusion 1.5 at 512x512, attention counted."""
FEW = 8
"""Runs of no more steps are those of distilled models, whose steps have little in common."""
LOUD = 2.0
"""A LoRA this many times as large as the median drowns the others."""

_TURNS = ("character", "clothing", "object", "background", "style")


@dataclass(frozen=True)
class Choice:
    """What `choose` decided.

    Args:
        method: a name from `cmlora.strategies.METHODS`.
        options: of the method.
        cache: text of a cache policy.
        uncond: ``shared`` or ``per_lora``, see `cmlora.branches.share_uncond`.
        order: names in the order of their turns.
        weights: factors on the user's strengths, by name; those that are not 1.
        reason: one line.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    cache: str = "none"
    uncond: Uncond = "per_lora"
    order: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


def auto(
    step: Step,
    members: Sequence[Member],
    policy: Policy,
    *,
    budget: Annotated[float, Between(1)] = 2.0,
    plain: bool = True,
) -> Plan:
    """The plan of the method that `choose` finds for these LoRAs and this number of steps.

    `cmlora.compose.compose` asks `choose` itself, with what it knows of the LoRAs' updates, and
    takes its cache too (see `knowing`); this is what can be said without a model.

    Args:
        step: the denoising step about to run.
        members: the LoRAs.
        policy: when cached features are refreshed.
        budget: mean cost of a step in merge passes, 1 or more.
        plain: whether all layers hold plain LoRAs, which is what `gate` can share out.
    """
    chosen = choose(members, step.count, budget=budget, plain=plain, cacheable=policy.reuse)
    return plan_of(chosen, step, members, policy)


def knowing(known: Updates, *, cached: bool = False) -> Strategy:
    """`auto` with what is known of the LoRAs' updates.

    Args:
        known: of the LoRAs.
        cached: whether the user wants features reused. Otherwise the policy is what seemed right
            before the number of steps was known, and a choice without cache reuses nothing.
    """

    def informed(step: Step, members: Sequence[Member], policy: Policy, **options: Any) -> Plan:
        chosen = decide(known, options, members, step.count, cacheable=policy.reuse)
        plan = plan_of(chosen, step, members, policy)
        if cached or chosen.cache != "none":
            return plan
        return replace(plan, passes=tuple(replace(p, may_reuse=False) for p in plan.passes))

    return informed


def decide(
    known: Updates,
    options: Mapping[str, Any],
    members: Sequence[Member],
    count: int,
    *,
    cacheable: bool,
) -> Choice:
    """`choose` with what is known of the LoRAs' updates, and the options of `auto`."""
    given = {"plain": known.plain, **options}
    return choose(members, count, **given, cacheable=cacheable, sizes=known.sizes)


def plan_of(chosen: Choice, step: Step, members: Sequence[Member], policy: Policy) -> Plan:
    """A step's plan by a choice: its method, order, weights and options."""
    method: Any = {
        "merge": merge,
        "gate": gate,
        "select": select,
        "delta": delta,
        "freeswitch": freeswitch,
        "switch": switch,
    }[chosen.method]
    named = {member.name: member for member in members}
    ordered = [
        replace(named[name], weight=named[name].weight * chosen.weights.get(name, 1.0))
        for name in chosen.order
    ]
    plan: Plan = method(step, ordered, policy, **chosen.options)
    return plan


def choose(
    members: Sequence[Member],
    count: int,
    *,
    budget: float = 2.0,
    plain: bool = True,
    cacheable: bool = True,
    sizes: Mapping[str, float] | None = None,
) -> Choice:
    """Decide by what is known; every rule has its reason in the result.

    Args:
        members: the LoRAs.
        count: T, the number of steps.
        budget: mean cost of a step in merge passes.
        plain: whether all layers hold plain LoRAs. Then one pass is enough, whatever the budget:
            of the methods in benchmarks/composition.md none with more of them draws more concepts.
        cacheable: whether features of the model can be reused.
        sizes: norm of every LoRA's update, if known.

    Raises:
        CmloraError: if there is no LoRA, or two have the same name.
    """
    ordered = by_name(members)
    order = _order(members)
    weights, loud = _levelled(sizes or {})
    said = f"; {', '.join(loud)} toned down" if loud else ""
    common: dict[str, Any] = {"order": order, "weights": weights}
    n = len(ordered)
    if n == 1:
        return Choice("merge", reason="merge: a single LoRA needs no composing", **common)
    if plain:
        reason = "gate: in one pass per step every place of every layer follows the right LoRAs"
        return Choice("gate", reason=reason + said, **common)
    passes = n + 1
    if passes <= budget:
        reason = f"select: {passes} full passes per step are within the budget of {budget:g}"
        return Choice("select", reason=reason + said, **common)
    if count <= FEW:
        if all(member.importance for member in ordered):
            reason = f"freeswitch: in {count} steps there is nothing to reuse; by measured profiles"
            return Choice("freeswitch", reason=reason + said, **common)
        reason = f"merge: in {count} steps there is nothing to reuse, and {budget:g} passes are few"
        return Choice("merge", reason=reason + said, **common)
    for interval in (2, 3) if cacheable else ():
        # the base's unconditional half serves all
        price = (passes + 1) / 2 * (1 / interval + (1 - 1 / interval) * LIGHT)
        if price <= budget:
            reason = (
                f"select with uniform:{interval} and a shared unconditional branch: about "
                f"{price:.1f} passes per step, within the budget of {budget:g}"
            )
            cache = f"uniform:{interval}"
            return Choice("select", cache=cache, uncond="shared", reason=reason + said, **common)
    for every in (1, 2, 4, 8):
        if 1 + 1 / every <= budget:
            reason = f"delta: {1 + 1 / every:g} passes per step, within the budget of {budget:g}"
            options = {"every": every}
            return Choice("delta", options=options, reason=reason + said, **common)
    if all(member.importance for member in ordered):
        reason = "freeswitch: one pass per step, by measured profiles"
        return Choice("freeswitch", reason=reason + said, **common)
    return Choice("switch", reason="switch: one pass per step" + said, **common)


def _order(members: Sequence[Member]) -> tuple[str, ...]:
    """By roles and profiles if they tell LoRAs apart; otherwise character first and style last."""
    early, late = phases(members)
    known = any(m.role is not None or m.frequency is not None for m in members)
    if known and not single_phase(early, late):
        return (*early, *late)
    places = {category: place for place, category in enumerate(_TURNS)}
    ranked = sorted(members, key=lambda m: (places.get(m.category or "", len(_TURNS) - 1), m.name))
    return tuple(member.name for member in ranked)


def _levelled(sizes: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    """Factors that bring LoRAs far above the median down to `LOUD` times it."""
    if len(sizes) < 2:
        return {}, []
    ranked = sorted(sizes.values())
    median = ranked[(len(ranked) - 1) // 2]
    loud = {n: LOUD * median / s for n, s in sorted(sizes.items()) if s > LOUD * median > 0}
    return loud, list(loud)
