"""Merges that are learnt on a model: the methods, and carrying them out on whole LoRAs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cmlora.adapters.merging.atlas import atlas
from cmlora.adapters.merging.concrete import concrete
from cmlora.adapters.merging.learn import Fitted, Loss, check, random_like, signed
from cmlora.adapters.merging.method import Method, read_options
from cmlora.adapters.merging.ziplora_trained import ziplora_trained
from cmlora.adapters.objective import Objective
from cmlora.errors import CmloraError
from cmlora.lora import LoRA, stack
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
    check(loras)
    title = name or "+".join(sorted(lora.name for lora in loras))
    ordered = sorted(loras, key=lambda lora: lora.name)
    losses: list[float] = []

    def value(point: tuple[float, ...]) -> float:
        with torch.no_grad():
            losses.append(float(loss(stack(list(zip(ordered, point, strict=True)), title))))
        on_step()
        return losses[-1]

    found = search(value, len(loras), budget=budget, bound=bound, seed=seed)
    beaten = None
    if control:
        again: dict[str, Any] = {"budget": budget, "bound": bound, "seed": seed}
        others = random_like(loras, seed)
        beaten = min(lorahub(others, loss, **again, control=False, on_step=on_step).losses)
    merged = stack(list(zip(ordered, found, strict=True)), title)
    strengths = {
        lora.name: dict.fromkeys(lora.updates, coefficient)
        for lora, coefficient in zip(ordered, found, strict=True)
    }
    facts = {"coefficients": dict(zip([x.name for x in ordered], found, strict=True))}
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
    """

    lora: LoRA
    fitted: Fitted
    losses: Mapping[str, float]


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
        CmloraError: for an unknown method or option, LoRAs that change no denoiser, or a method
            that follows gradients where there are none.
    """
    rules = LEARNED[method].object
    if not objective.differentiable and method != "lorahub":
        raise CmloraError(f"{method} follows gradients, and this objective has none; use lorahub")
    values = read_options(method, rules, options)
    if rank is not None and rank < 1:
        raise CmloraError(f"rank is {rank}, expected 1 or more")
    ready = [scaled(lora, weight) for lora, weight in zip(loras, weights, strict=True)]
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
    found = fitted.lora if rank is None else fitted.lora.truncate(rank)
    text = [_part(lora, lambda module: not module.startswith(start)) for lora in ready]
    rest = stack([(lora, 1.0) for lora in text], "text")
    count = len(inside)
    losses = {
        "learned": objective.value(found),
        "sum": objective.value(stack([(lora, 1.0) for lora in inside], "sum")),
        "mean": objective.value(stack([(lora, 1 / count) for lora in inside], "mean")),
        "base": objective.value(None),
    }
    if fitted.control is not None:
        losses["random"] = fitted.control
    recipe = json.loads(found.metadata["cmlora.merge"])
    recipe |= {"weights": list(weights), "options": values, "seed": seed, "rank": rank}
    merged = replace(
        found,
        name=name or found.name,
        updates={**found.updates, **(rest if rank is None else rest.truncate(rank)).updates},
        triggers=tuple(dict.fromkeys(word for lora in loras for word in lora.triggers)),
        metadata={**found.metadata, "cmlora.merge": json.dumps(recipe, sort_keys=True)},
    )
    return Learned(merged, fitted, losses)


def _part(lora: LoRA, wanted: Callable[[str], bool]) -> LoRA:
    return replace(lora, updates={m: u for m, u in lora.updates.items() if wanted(m)})
