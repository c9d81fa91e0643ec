"""K-LoRA (arXiv 2502.18461): in every layer and at every step either subject or style."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any, Literal

from cmlora.errors import CmloraError
from cmlora.plan import Member, Pass, Plan, Policy, Step, Strength
from cmlora.strategies._passes import by_name, may_reuse, together
from cmlora.strategies.options import Between

Masses = tuple[tuple[str, tuple[tuple[float, float], ...]], ...]
"""By module, (largest entries, all entries) of every LoRA in the order of their names."""


def klora(
    step: Step,
    members: Sequence[Member],
    policy: Policy,
    *,
    alpha: Annotated[float, Between(0)] = 1.5,
    beta: Annotated[float | None, Between(0)] = None,
    curve: Literal["rising", "wrapped"] = "rising",
) -> Plan:
    """One pass in which every layer has one LoRA: subject if S_c / gamma > S_s S(x), else style.

    S_c and S_s are the sums of the K largest absolute entries of the two updates of a layer, K the
    product of their ranks; gamma is the mean ratio of the sums of all their entries over the
    layers, taken again without layers above three times the mean. S(x) = alpha x + beta grows
    with progress x, so a layer goes from subject to style once. The sums are
    `cmlora.plan.Member.mass`, computed once per composition by `masses`; the schedule is then a
    table that costs nothing. Layers of unknown mass are all alike: equal LoRAs switch at x = 1/3.

    The style is the LoRA of category "style", otherwise the last one in the user's order. With
    more than two LoRAs the strongest of the scaled scores S / gamma has the layer; that is ours.

    Args:
        step: the denoising step about to run.
        members: the LoRAs; without a style among them the last is taken for it.
        policy: when cached features are refreshed.
        alpha: slope of S.
        beta: S(0); 0.5, or 0.85 alpha if wrapped, unless set.
        curve: ``wrapped`` is the paper's S*(x) = (alpha x + beta) mod alpha, under which a layer
            may go from subject to style and back.
    """
    ordered = by_name(members)
    if len(ordered) == 1:
        return Plan((together(ordered, may_reuse(step, policy)),))
    styles = [member.name for member in ordered if member.category == "style"]
    styles = styles or [members[-1].name]
    flags = tuple(member.name in styles for member in ordered)
    won = owners(_masses(ordered), flags, scale(step.fraction, alpha, beta, curve))
    weights: dict[str, Strength] = {}
    for j, member in enumerate(ordered):
        mine = [module for module, owner in won if owner == j]
        if len(mine) == len(won):
            weights[member.name] = member.weight
        elif mine:
            pattern = f"^(?:{'|'.join(map(re.escape, mine))})$"
            weights[member.name] = ((pattern, member.weight),)
    return Plan((Pass(weights, may_reuse(step, policy)),))


def scale(x: float, alpha: float, beta: float | None, curve: str) -> float:
    """S(x), or S*(x) of the wrapped curve.

    >>> scale(1 / 3, 1.5, None, "rising"), round(scale(0.15, 1.5, None, "wrapped"), 9) % 1.5
    (1.0, 0.0)
    """
    if curve == "rising":
        return alpha * x + (0.5 if beta is None else beta)
    value = alpha * x + (0.85 * alpha if beta is None else beta)
    return value % alpha if alpha > 0 else value


@lru_cache(maxsize=256)
def owners(masses: Masses, styles: tuple[bool, ...], factor: float) -> tuple[tuple[str, int], ...]:
    """Which LoRA has each module: pairs of its name and the LoRA's place in the order of names.

    Args:
        masses: see `Masses`.
        styles: which of the LoRAs are styles; one of them at least.
        factor: S(x).
    """
    reference = styles.index(True)
    gammas = [_gamma(masses, j, reference) for j in range(len(styles))]
    found = []
    for module, row in masses:
        scores = [
            (largest / gammas[j]) * (factor if styles[j] else 1.0)
            for j, (largest, _) in enumerate(row)
        ]
        # of equal scores the style's wins: the rule has "greater than" for the subject
        best = max(range(len(row)), key=lambda j: (scores[j], styles[j], -j))
        found.append((module, best))
    return tuple(found)


def _gamma(masses: Masses, one: int, other: int) -> float:
    """Mean ratio of two LoRAs' entries over the layers that both have, without outliers."""
    ratios = [row[one][1] / row[other][1] for _, row in masses if row[one][1] and row[other][1]]
    if not ratios:
        return 1.0
    mean = sum(ratios) / len(ratios)
    usual = [ratio for ratio in ratios if ratio <= 3 * mean]
    return sum(usual) / len(usual)


def _masses(members: Sequence[Member]) -> Masses:
    """The members' masses as one table; a single module of equal masses if any is unknown."""
    if any(member.mass is None for member in members):
        return (("", ((1.0, 1.0),) * len(members)),)
    tables = [member.mass or {} for member in members]
    modules = sorted({module for table in tables for module in table})
    return tuple((m, tuple(t.get(m, (0.0, 0.0)) for t in tables)) for m in modules)


def masses(denoiser: Any, names: Sequence[str]) -> dict[str, dict[str, tuple[float, float]]]:
    """What `cmlora.plan.Member.mass` should be for LoRAs in a denoiser.

    Args:
        denoiser: a model with injected adapters.
        names: of those that are composed; K is the product of the two largest ranks among them.

    Returns:
        by LoRA and module, the sum of its K largest absolute entries and of all of them.

    Raises:
        CmloraError: if the weights cannot be read.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in names}
    for path, layer in denoiser.named_modules():
        if not (isinstance(layer, BaseTunerLayer) and hasattr(layer, "get_delta_weight")):
            continue
        held = [name for name in names if name in getattr(layer, "r", {})]
        ranks = sorted((_rank(layer.r[name]) for name in held), reverse=True)
        largest = ranks[0] * ranks[1] if len(ranks) > 1 else ranks[0] ** 2 if ranks else 0
        for name in held:
            update = layer.get_delta_weight(name).detach()
            if update.is_meta:
                raise CmloraError(
                    "klora compares the weights of the LoRAs, which sequential offloading keeps "
                    "out of reach; use enable_model_cpu_offload() or another method"
                )
            entries = update.float().abs().flatten()
            top = entries.topk(min(largest, entries.numel())).values
            found[name][path] = (float(top.sum()), float(entries.sum()))
    return found


def weighed(denoisers: Iterable[Any], members: Sequence[Member]) -> tuple[Member, ...]:
    """The members with the masses of their updates, where they have none yet.

    Args:
        denoisers: all of a pipeline's.
        members: the LoRAs.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {member.name: {} for member in members}
    for denoiser in denoisers:
        for name, modules in masses(denoiser, list(found)).items():
            found[name].update(modules)
    return tuple(m if m.mass is not None else replace(m, mass=found[m.name]) for m in members)


def _rank(value: Any) -> int:
    """PEFT keeps one rank per adapter, some kinds a mapping of ranks."""
    return int(value) if isinstance(value, int) else 1


def table(
    members: Mapping[str, Mapping[str, tuple[float, float]]], styles: Sequence[str], count: int
) -> tuple[dict[str, str], ...]:
    """The whole schedule: at every step, which LoRA each module has.

    Args:
        members: masses by LoRA.
        styles: which of them are styles.
        count: T.
    """
    names = sorted(members)
    rows = _masses([Member(name, mass=members[name]) for name in names])
    flags = tuple(name in styles for name in names)
    return tuple(
        {m: names[j] for m, j in owners(rows, flags, scale(i / count, 1.5, None, "rising"))}
        for i in range(count)
    )
