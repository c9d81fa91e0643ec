"""The jobs of a study: one per set, method with its cache, and seed, each with a stable key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cmlora.caching.policy import parse
from cmlora.cost import PassCost, RunCost, plan_cost
from cmlora.errors import CmloraError
from cmlora.eval.manifest import set_id
from cmlora.eval.studio import Studio
from cmlora.eval.variants import Variant
from cmlora.recipe import Recipe
from cmlora.strategies import METHODS, schedule
from cmlora.strategies.options import defaults

SEARCHED = {"lorahub": "coefficients"}
"""Options that a method looks for itself, picture by picture, if the user does not give them."""


@dataclass(frozen=True)
class Job:
    """One picture to be made.

    Args:
        key: of everything that changes the picture, 64 hex digits, the same on every machine.
        ids: the set.
        variant: method with its own options, and cache.
        seed: as the user counts them; the noise also depends on the set.
        recipe: how to make it, but for options that the method looks for itself.
    """

    key: str
    ids: tuple[str, ...]
    variant: Variant
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """For messages."""
        return f"{set_id(self.ids)} {self.variant.label} seed {self.seed}"

    @property
    def searched(self) -> str | None:
        """The option that is to be looked for before the picture can be made."""
        option = SEARCHED.get(self.variant.method)
        known = self.recipe.options.get(option) if option else None
        return option if option and not known else None


def jobs_of(
    studio: Studio,
    sets: Sequence[tuple[str, ...]],
    variants: Sequence[Variant],
    seeds: Sequence[int],
    options: Mapping[str, Any] | None = None,
) -> list[Job]:
    """Every combination of set, seed and method, in this order of nesting.

    All methods of a set and a seed start from the same noise; different sets do not.

    Args:
        studio: the model and LoRAs.
        sets: LoRA ids.
        variants: methods with their caches.
        seeds: of the initial noise.
        options: values or texts by name, for every method that has an option of that name and
            whose variant does not set it.

    Raises:
        CmloraError: for an option that none of the methods has, a wrong value, or two variants
            that are the same with these options.
    """
    wanted = dict(options or {})
    _check_options(variants, wanted)
    shared = studio.base_recipe()
    bases: dict[Variant, Recipe] = {}
    for variant in variants:
        bases[variant] = replace(
            shared,
            method=variant.method,
            cache=variant.cache,
            options=variant.options_with(wanted),
        )
    _check_apart(bases)
    found = []
    for ids in sets:
        loras, prompt = studio.ingredients(ids), studio.manifest.prompt_of(ids)
        for seed in seeds:
            for variant in variants:
                recipe = replace(
                    bases[variant],
                    loras=loras,
                    prompt=prompt,
                    seed=seed,
                    index=noise_index(ids),
                )
                key = job_key(recipe, studio.model_hash)
                found.append(Job(key, tuple(ids), variant, seed, recipe))
    return found


def noise_index(ids: Sequence[str]) -> int:
    """A set's picture number in a run, from its ids alone; see `cmlora.recipe.image_seed`."""
    digest = hashlib.sha256(set_id(sorted(ids)).encode()).digest()
    return 1 + int.from_bytes(digest[:6], "big")


def job_key(recipe: Recipe, model_hash: str) -> str:
    """A job's identity: its recipe, with the model by its content instead of its place."""
    return replace(recipe, model="-", model_hash=model_hash).digest()


def planned_cost(studio: Studio, job: Job, one: PassCost) -> RunCost:
    """What a job will take, without running it.

    Args:
        studio: the model and LoRAs.
        job: which one; what looking for coefficients takes is not part of it.
        one: cost of a pass.
    """
    members = studio.members(job.ids)
    options = dict(job.recipe.options)
    if job.searched is not None:
        options[job.searched] = (1.0,) * len(members)
    policy = parse(job.variant.cache)
    plans = schedule(job.variant.method, members, job.recipe.steps, policy, **options)
    return plan_cost(plans, one.full, one.light if policy.reuse else None)


def _check_apart(bases: Mapping[Variant, Recipe]) -> None:
    """No two variants come to the same once the common options are in them."""
    known: dict[str, Variant] = {}
    for variant, recipe in bases.items():
        first = known.setdefault(recipe.digest(), variant)
        if first != variant:
            raise CmloraError(
                f"methods {first.label!r} and {variant.label!r} are the same with these options"
            )


def _check_options(variants: Sequence[Variant], options: Mapping[str, Any]) -> None:
    """Every option belongs to a method, and every method can read its own."""
    listed: dict[str, None] = {}
    for variant in variants:
        listed |= dict.fromkeys(defaults(METHODS[variant.method].object))
        variant.options_with(options)
    for option in options:
        if option not in listed:
            known_ = ", ".join(sorted(listed)) or "none"
            raise CmloraError(f"none of the methods has option {option!r}; known: {known_}")
