"""Merges that are learnt on a model: the methods, and carrying them out on whole LoRAs."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cmlora.adapters.merging.account import Account
from cmlora.adapters.merging.atlas import atlas
from cmlora.adapters.merging.check import check_rank, check_shape, check_values
from cmlora.adapters.merging.concrete import concrete
from cmlora.adapters.merging.factors import Pair
from cmlora.adapters.merging.factors import stack as exact_sum
from cmlora.adapters.merging.learn import Fitted, Loss, prepared, random_like, signed
from cmlora.adapters.merging.method import Method, read_options
from cmlora.adapters.merging.result import Report
from cmlora.adapters.merging.written import baked, inherited, widest
from cmlora.adapters.merging.ziplora_trained import ziplora_trained
from cmlora.adapters.objective import Objective
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, Update, stack
from cmlora.pipelines.objectives import scaled
from cmlora.registry import Entry, Registry
from cmlora.strategies.lorahub import search


def lorahub(
    loras: Sequence[LoRA],
    loss: Loss,
    *,
    budget: int = 40,
    bound: float = 1.5,
    control: bool = True,
    seed: int = 0,
    name: str | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Fitted:
    """One coefficient per LoRA, searched without gradients (arXiv:2307.13269).

    Minimises the loss plus 0.05 times the mean magnitude of the coefficients, which start at zero.

    Args:
        loras: with different names, already multiplied by their weights.
        loss: of the merged LoRA; only its value is used.
        budget: evaluations of the loss.
        bound: largest magnitude of a coefficient.
        control: search for random LoRAs too, which doubles the time.
        seed: of the search, and of the random LoRAs.
        name: of the result; the names joined by ``+`` if none is given.
        on_step: called after every evaluation.
    """
    loras, _ = prepared(loras)
    title = name or "+".join(lora.name for lora in loras)
    losses: list[float] = []

    def value(point: tuple[float, ...]) -> float:
        with torch.no_grad():
            losses.append(float(loss(stack(list(zip(loras, point, strict=True)), title))))
        on_step()
        return losses[-1]

    found = search(value, len(loras), budget=budget, bound=bound, seed=seed)
    beaten = None
    if control:
        again: dict[str, Any] = {"budget": budget, "bound": bound, "seed": seed}
        others = random_like(loras, seed)
        beaten = min(lorahub(others, loss, **again, control=False, on_step=on_step).losses)
    merged = stack(list(zip(loras, found, strict=True)), title)
    strengths = {
        lora.name: dict.fromkeys(lora.updates, coefficient)
        for lora, coefficient in zip(loras, found, strict=True)
    }
    facts = {"coefficients": dict(zip([x.name for x in loras], found, strict=True))}
    return Fitted(
        signed(merged, "lorahub", loras, **facts, budget=budget), tuple(losses), strengths, beaten
    )


_LAWS = frozenset({"ranks", "many"})

LEARNED: Registry[Method] = Registry(
    "learned merging method",
    Entry(
        "lorahub",
        Method(lorahub, "other", _LAWS),
        "one strength per LoRA, searched without gradients",
        "arXiv:2307.13269",
    ),
    Entry(
        "atlas",
        Method(atlas, "other", _LAWS | {"units", "gauge"}),
        "one strength per LoRA and module",
        "arXiv:2407.02880",
    ),
    Entry(
        "concrete",
        Method(concrete, "other", _LAWS | {"units", "gauge"}),
        "a mask over the rank units or entries of all LoRAs",
        "arXiv:2312.06173",
    ),
    Entry(
        "ziplora_trained",
        Method(ziplora_trained, "other", _LAWS | {"units", "gauge"}),
        "one strength per LoRA and input column, with a penalty on overlap",
        "arXiv:2311.13600",
    ),
)


@dataclass(frozen=True)
class Learned:
    """A learned merge beside what it has to beat.

    Args:
        lora: the result, text encoders included.
        fitted: what was learnt for the denoiser.
        losses: ``learned``; ``sum`` of the LoRAs at their weights; their ``mean``; ``base``, the
            model alone; ``random``, the same method on random LoRAs, if it was asked for.
        report: what it cost, and how far the result is from the weighted sum.
    """

    lora: LoRA
    fitted: Fitted
    losses: Mapping[str, float]
    report: Report


def learn(
    method: str,
    loras: Sequence[LoRA],
    weights: Sequence[float],
    objective: Objective,
    *,
    name: str | None = None,
    rank: int | None = None,
    seed: int = 0,
    control: bool = True,
    on_step: Callable[[], None] = lambda: None,
    **options: Any,
) -> Learned:
    """Merges LoRAs by one of `LEARNED`.

    Only the denoiser's part is learnt, as the objective knows no other; the parts for text
    encoders are added up at their weights.

    Args:
        method: a name from `LEARNED`.
        loras: of one family, with different names.
        weights: of the LoRAs before anything is learnt.
        objective: what is to be reached.
        name: of the result.
        rank: the largest rank of a module in the result, cut after learning.
        seed: of whatever is random.
        control: learn on random LoRAs too, which doubles the time.
        on_step: called after every step.
        options: of the method.

    Raises:
        CmloraError: for an unknown method or option, LoRAs that change no denoiser, a rank that is
            not possible, or a method that follows gradients where there are none.
    """
    account = Account()
    rules = LEARNED[method].object
    if not objective.differentiable and method != "lorahub":
        raise CmloraError(f"{method} follows gradients, and this objective has none; use lorahub")
    values = read_options(method, rules, options)
    pairs = sorted(zip(loras, weights, strict=True), key=lambda pair: pair[0].name)
    ready = [scaled(lora, weight) for lora, weight in pairs]
    check_values(ready)
    modules = sorted({module for lora in ready for module in lora.updates})
    table = {m: [x.updates[m] for x in ready if m in x.updates] for m in modules}
    for module in modules:
        check_shape(module, [(x.name, x.updates[module]) for x in ready if module in x.updates])
    check_rank(rank, table.values())
    start = f"{objective.component}."
    inside = [_part(lora, lambda module: module.startswith(start)) for lora in ready]
    if not all(lora.updates for lora in inside):
        raise CmloraError(f"{method} learns what LoRAs do to the {objective.component}")
    fitted: Fitted = rules.function(
        inside,
        objective.loss,
        control=control,
        seed=seed,
        name=name,
        on_step=on_step,
        **values,
    )
    text = [_part(lora, lambda module: not module.startswith(start)) for lora in ready]
    rest = stack([(lora, 1.0) for lora in text], "text")
    if rest.updates:
        only = f"only the {objective.component} is learnt; text encoders are added up"
        account.remarks[only] = None
    dtype = widest([update for lora in loras for update in lora.updates.values()])
    updates: dict[str, Update] = {}
    for module, update in {**fitted.lora.updates, **rest.updates}.items():
        pair = whole = Pair(*update.factors())
        if rank is not None and update.rank > rank:
            pair = Pair(*update.truncate(rank).factors())
            account.cuts.add(module, pair.distance(whole), whole.norm())
        parts = [Pair(*own.factors()) for own in table[module]]
        exact = exact_sum(parts, [1.0] * len(parts))
        account.gaps.compare(module, pair, exact, math.fsum(part.norm() for part in parts))
        updates[module] = baked(pair, update.shape, dtype, account.remarks)
    found = replace(fitted.lora, updates=updates)
    count = len(inside)
    losses = {
        "learned": objective.value(_part(found, lambda module: module.startswith(start))),
        "sum": objective.value(stack([(lora, 1.0) for lora in inside], "sum")),
        "mean": objective.value(stack([(lora, 1 / count) for lora in inside], "mean")),
        "base": objective.value(None),
    }
    if fitted.control is not None:
        losses["random"] = fitted.control
        if fitted.control <= losses["learned"]:
            account.remarks["random LoRAs do as well: these had nothing to teach here"] = None
    if losses["learned"] > losses["sum"]:
        account.remarks["the plain sum has a lower loss than what was learnt"] = None
    recipe = json.loads(found.metadata["cmlora.merge"])
    recipe |= {"loras": [x.name for x, _ in pairs], "weights": [w for _, w in pairs]}
    recipe |= {"options": values, "seed": seed, "rank": rank}
    about = {"cmlora.merge": json.dumps(recipe, sort_keys=True)}
    merged = replace(
        found,
        name=name or found.name,
        triggers=tuple(dict.fromkeys(word for lora, _ in pairs for word in lora.triggers)),
        metadata={**inherited(loras), **found.metadata, **about},
    )
    return Learned(merged, fitted, losses, account.report(method, rules.kind, updates))


def _part(lora: LoRA, wanted: Callable[[str], bool]) -> LoRA:
    return replace(lora, updates={m: u for m, u in lora.updates.items() if wanted(m)})
