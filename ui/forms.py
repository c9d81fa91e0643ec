"""From the values of a page's fields to an order, and back."""

import json
from collections.abc import Mapping
from typing import Any

from cmlora import checks
from cmlora.errors import CmloraError
from cmlora.recipe import Recipe
from cmlora.strategies.former import recalled
from cmlora.ui.order import SAMPLERS, Order, read_options

FIELDS = (
    "model",
    "loras",
    "prompt",
    "negative_prompt",
    "method",
    "options",
    "cache",
    "sampler",
    "steps",
    "guidance",
    "width",
    "height",
    "seed",
    "pictures",
    "schedule",
    "everywhere",
)
"""The fields of the Generate page, in the order in which its events send them."""


def read_selection(text: Any) -> dict[str, float]:
    """Strengths by LoRA name from the JSON that the page keeps.

    Raises:
        CmloraError: if it is anything else.

    >>> read_selection('{"ink": 0.5}')
    {'ink': 0.5}
    """
    try:
        table = json.loads(text or "{}") if isinstance(text, str) else text
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, Mapping):
        raise CmloraError("the selection of LoRAs is not a table of strengths by name")
    return {
        str(name): checks.real("selection", f"strength of {str(name)[:60]}", weight)
        for name, weight in table.items()
    }


def order_of(*values: Any) -> Order:
    """The order that the fields make up; empty numbers are the model's own.

    Args:
        values: one per name in `FIELDS`.

    Raises:
        CmloraError: if LoRAs or options cannot be read.
    """
    given = dict(zip(FIELDS, values, strict=True))
    return Order(
        model=given["model"] or "",
        prompt=given["prompt"] or "",
        loras=read_selection(given["loras"]),
        negative_prompt=given["negative_prompt"] or "",
        method=given["method"] or "",
        options=read_options(given["options"] or ""),
        cache=(given["cache"] or "").strip(),
        sampler=given["sampler"] or "model's own",
        steps=given["steps"],
        guidance=given["guidance"],
        width=given["width"] or None,
        height=given["height"] or None,
        seed=given["seed"] or 0,
        pictures=given["pictures"],
        schedule=(given["schedule"] or "").strip(),
        scopes=dict.fromkeys(given["everywhere"] or (), "global"),
    )


def fields_of(recipe: Recipe, names: Mapping[str, str]) -> dict[str, Any]:
    """Values for the page's fields that ask for a recipe's picture again; the model aside.

    Args:
        recipe: of the picture.
        names: what the page calls the recipe's LoRAs, by their names in the recipe.
    """
    named = {cls: name for name, cls in SAMPLERS.items()}
    options = recalled(recipe.method, recipe.options)
    return {
        "loras": {names[lora.name]: lora.weight for lora in recipe.loras},
        "prompt": recipe.prompt,
        "negative_prompt": recipe.negative_prompt,
        "method": recipe.method,
        "options": "; ".join(f"{key}={_plain(value)}" for key, value in options.items()),
        "cache": recipe.cache,
        "sampler": named.get(recipe.scheduler, "model's own"),
        "steps": recipe.steps,
        "guidance": recipe.guidance_scale,
        "width": recipe.width,
        "height": recipe.height,
        "seed": recipe.seed,
        "pictures": 1,
        "schedule": recipe.schedule,
        "everywhere": [names[x.name] for x in recipe.loras if x.scope == "global"],
    }


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
