"""CMLoRA (arXiv 2502.04923): every LoRA predicts, one dominates, the others reuse features."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Annotated, Literal

from cmlora.caching.modifiers import refresh_steps
from cmlora.caching.policy import nonuniform
from cmlora.errors import CmloraError
from cmlora.frequency.order import Order, phases
from cmlora.frequency.order import order as ordered_by
from cmlora.plan import Member, Pass, Plan, Policy, Step
from cmlora.strategies._clock import Era, events, latest, spans, ticks
from cmlora.strategies._online import Readings, probe_steps, read
from cmlora.strategies._passes import by_name, may_reuse, together
from cmlora.strategies._released import Partition, released
from cmlora.strategies.options import Between, defaults


def cmlora(
    step: Step,
    members: Sequence[Member],
    policy: Policy,
    *,
    partition: Partition = "offline",
    mode: Literal["paper", "released"] = "paper",
    order: Order = "measured",
    late: Annotated[float, Between(0, 1)] = 0.6,
    dominance: Annotated[float | None, Between(0)] = None,
    decay: Annotated[bool | float, Between(0, 1)] = 0.5,
    floor: Annotated[float, Between(0)] = 1.0,
    switch: Annotated[float | None, Between(0.001, 1)] = None,
    decay_clock: Annotated[float | None, Between(0.001, 1)] = None,
    dominant_full: Literal["refresh", "always"] = "refresh",
    max_age: Annotated[float | None, Between(0, 1)] = 0.2,
    threshold: Annotated[float, Between(0, 1)] = 0.4,
    split: Annotated[float, Between(0, 1)] = 0.2,
    probes: Annotated[int, Between(0)] = 3,
) -> Plan:
    """N passes with one LoRA each; the dominant LoRA has the larger share and the fresh feature.

    With dominant weight c the shares are c / (c + N - 1) for the dominant and 1 / (c + N - 1) for
    each other LoRA (the paper's collective guidance, Eq. 5); c = 1 is Composite. At a refresh step
    the dominance passes to the next LoRA of the phase and that LoRA alone runs in full; at all
    other steps, and for all other LoRAs, cached features are reused.

    Args:
        step: the denoising step about to run.
        members: the LoRAs.
        policy: the refresh clock; with an age, a slot that reaches it is renewed between refreshes
            too. A policy without reuse makes every pass full; the dominance then moves at the
            refresh steps of the paper's non-uniform policy.
        partition: ``offline``: phases by labels and profiles, the late one from ``late`` on;
            ``online``: late while the latent's high-frequency share m is below ``threshold``, and
            LoRAs of unknown class are measured at ``probes`` steps; ``async``: a single phase,
            switched every ``switch`` (0.1 unless set) independently of the refreshes.
        mode: ``paper``, or ``released`` for the published code's schedule with its defects, which
            takes no option but ``partition``.
        order: which class comes first, see `cmlora.frequency.order.phases`.
        late: tau*, where the late phase begins, as a fraction of the steps.
        dominance: c at the first step; N - 1/2 unless set.
        decay: c_k = c_0 - sum_{j=1..k} decay^j after k switches; true is 0.5, false is constant.
        floor: c never falls below it; 1 keeps the dominant from being outweighed.
        switch: switch clock, the fraction of a run between changes of dominance; unset: at
            every refresh.
        decay_clock: decay clock, likewise; unset: at every switch.
        dominant_full: ``always`` runs the dominant in full at every step.
        max_age: at refresh steps, slots as old as this fraction of the run are renewed too, and
            all of them when the phase changes; ``None`` renews the dominant's alone.
        threshold: g, for ``online``; best a quantile of the values of m that runs have shown.
        split: h, the relative radius where ``online`` lets high frequencies begin.
        probes: how often ``online`` measures unknown LoRAs, with one base pass each.

    Raises:
        CmloraError: for options that ``released`` does not have, and what that mode cannot place.
    """
    given = dict(locals())
    ordered = by_name(members)
    if mode == "released":
        fixed = {n: d for n, d in defaults(cmlora).items() if n not in ("mode", "partition")}
        unused = [name for name, default in fixed.items() if given[name] != default]
        if unused:
            raise CmloraError(f"mode='released' has no {', '.join(unused)}: its rules are fixed")
        return released(step, members, policy, partition)
    if len(ordered) == 1:
        return Plan((together(ordered, may_reuse(step, policy)),))

    count = step.count
    refreshes = refresh_steps(policy, step) if policy.reuse else nonuniform().refreshes(count)
    interval = 0.1 if switch is None and partition == "async" else switch
    switches = refreshes if interval is None else ticks(interval, count)
    if partition == "online":
        probing = step.index in probe_steps(members, count, late, probes)
        known = read(step, members, order, step.index in switches, probing, threshold, split)
    else:
        known = Readings((Era(0, *phases(members, order)),), {}, False, None)
    if partition == "async":
        rotation = tuple(ordered_by(members, order))
        known = Readings((Era(0, rotation, rotation),), {}, False, None)
    edge = spans(late, count)
    age, oldest = (
        None if limit is None else max(1, spans(limit, count))
        for limit in (max_age, getattr(policy, "age", None))
    )
    always = dominant_full == "always"
    is_late = frozenset(tick for tick in switches if known.late.get(tick, tick >= edge))
    row = events(switches, refreshes, is_late, known.eras, age, always, oldest, count)
    event = latest(row, step.index)

    def full(name: str) -> bool:
        renewed = event.step == step.index and name in event.renewed
        return not policy.reuse or known.probing or renewed or (always and name == event.dominant)

    switched = event.switches
    if decay_clock is not None:
        switched = bisect_right(ticks(decay_clock, count), step.index) - 1
    c = dominant_weight(len(ordered), switched, dominance, decay, floor)
    shares = [(c if m.name == event.dominant else 1.0) / (c + len(ordered) - 1) for m in ordered]
    passes = [together([m], not full(m.name)) for m in ordered]
    if known.probing:
        passes, shares = [*passes, Pass({})], [*shares, 0.0]
    return Plan(tuple(passes), tuple(shares), known.observe)


def dominant_weight(
    n: int,
    switches: int,
    dominance: float | None = None,
    decay: bool | float = 0.5,
    floor: float = 1.0,
) -> float:
    """c_k = max(floor, c_0 - sum_{j=1..k} decay^j), with c_0 = N - 1/2.

    >>> [dominant_weight(3, k) for k in range(4)], [dominant_weight(2, k) for k in range(4)]
    ([2.5, 2.0, 1.75, 1.625], [1.5, 1.0, 1.0, 1.0])
    """
    start = n - 0.5 if dominance is None else dominance
    base = (0.5 if decay else 0.0) if isinstance(decay, bool) else decay
    lost = switches if base == 1 else base * (1 - base**switches) / (1 - base)
    return max(floor, start - lost)
