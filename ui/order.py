"""What a visitor asks for, checked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, get_args

from cmlora import checks
from cmlora.caching.policy import parse
from cmlora.errors import CmloraError
from cmlora.plan import Scope
from cmlora.schedules.parse import parse_schedule
from cmlora.strategies import METHODS, check_options
from cmlora.ui.prompts import tags
from cmlora.ui.settings import Limits

if TYPE_CHECKING:
    from cmlora.pipelines.render import Wish

SAMPLERS: Mapping[str, str] = {
    "model's own": "",
    "DDIM": "DDIMScheduler",
    "Euler": "EulerDiscreteScheduler",
    "Euler a": "EulerAncestralDiscreteScheduler",
    "DPM++ 2M": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "Heun": "HeunDiscreteScheduler",
    "LMS": "LMSDiscreteScheduler",
    "PLMS": "PNDMScheduler",
}
"""Samplers on the page and their classes in diffusers; the first leaves the model's."""

_HERE = "request"


@dataclass(frozen=True)
class Order:
    """One request for pictures.

    Args:
        model: a name from the list of models.
        prompt: what to draw; may hold ``<lora:name:weight>``.
        loras: strengths by name from the list of LoRAs.
        negative_prompt: what to avoid.
        method: a composition method.
        options: of the method.
        cache: text of a cache policy; empty is the method's own.
        sampler: a key of `SAMPLERS`.
        steps: denoising steps.
        guidance: guidance scale; ``None`` is the model's.
        width: in pixels; ``None`` is the model's.
        height: in pixels; ``None`` is the model's.
        seed: of the first picture.
        pictures: how many.
        text_encoder: how LoRAs act on the text encoder: ``all``, ``none`` or ``per_lora``.
        schedule: curves of strengths over the run, see `cmlora.schedules.parse`.
        scopes: by LoRA, ``global`` for one that changes the whole picture, such as a style, or
            ``local``, where its file does not say so.
    """

    model: str
    prompt: str = ""
    loras: Mapping[str, float] = field(default_factory=dict)
    negative_prompt: str = ""
    method: str = "cmlora"
    options: Mapping[str, Any] = field(default_factory=dict)
    cache: str = ""
    sampler: str = "model's own"
    steps: int = 30
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    seed: int = 0
    pictures: int = 1
    text_encoder: str = "all"
    schedule: str = ""
    scopes: Mapping[str, Any] = field(default_factory=dict)

    def wish(self, triggers: str = "") -> Wish:
        """The order as the renderer understands it.

        Args:
            triggers: the prompt where there is none.
        """
        from cmlora.pipelines.render import Wish

        size = None
        if self.width is not None and self.height is not None:
            size = (self.width, self.height)
        return Wish(
            prompt=self.prompt or triggers,
            method=self.method,
            options=dict(self.options),
            cache=self.cache or None,
            text_encoder=self.text_encoder,
            schedule=self.schedule,
            negative_prompt=self.negative_prompt,
            steps=self.steps,
            guidance_scale=self.guidance,
            size=size,
            seed=self.seed,
        )


def check(order: Order, limits: Limits) -> Order:
    """The order with numbers of the right kind, or a refusal.

    Raises:
        CmloraError: if a value is of the wrong kind, unknown, or beyond a limit.
    """
    for name in ("model", "prompt", "negative_prompt", "method", "cache", "sampler", "schedule"):
        checks.text(_HERE, name, getattr(order, name))
    for name in ("prompt", "negative_prompt", "schedule"):
        length = len(getattr(order, name))
        if length > limits.prompt:
            raise CmloraError(
                f"{_HERE}: {name} has {length} letters; at most {limits.prompt} are read"
            )
    checks.choice(_HERE, "text_encoder", order.text_encoder, ("all", "none", "per_lora"))
    checks.choice(_HERE, "sampler", order.sampler, tuple(SAMPLERS))
    for name, scope in checks.table(_HERE, "scopes", order.scopes).items():
        checks.choice(_HERE, f"scope of {name[:60]}", scope, get_args(Scope))
    METHODS[order.method]
    parse_schedule(order.schedule)
    if order.cache:
        parse(order.cache)
    most = {"steps": limits.steps, "pictures": limits.pictures, "seed": 2**63 - 1}
    whole = {
        name: _whole(name, getattr(order, name), int(name != "seed"), bound)
        for name, bound in most.items()
    }
    sides = {}
    for name in ("width", "height"):
        value = getattr(order, name)
        sides[name] = None if value in (None, 0) else _whole(name, value, 8, limits.side)
    if (sides["width"] is None) != (sides["height"] is None):
        raise CmloraError(f"{_HERE}: give both width and height, or neither")
    guidance = order.guidance
    if guidance is not None:
        guidance = _between("guidance", guidance, 0.0, limits.guidance)
    return replace(
        order,
        loras=check_strengths(order.loras, limits),
        options=check_options(order.method, checks.table(_HERE, "options", order.options)),
        guidance=guidance,
        width=sides["width"],
        height=sides["height"],
        steps=whole["steps"],
        pictures=whole["pictures"],
        seed=whole["seed"],
    )


def check_strengths(loras: Any, limits: Limits) -> dict[str, float]:
    """Strengths by name; the names themselves are looked up elsewhere.

    Raises:
        CmloraError: if there are too many, or a strength is no number or too large.
    """
    if not isinstance(loras, Mapping):
        raise CmloraError(f"{_HERE}: loras is not a table of strengths by name")
    if len(loras) > limits.loras:
        raise CmloraError(f"{_HERE}: {len(loras)} LoRAs; at most {limits.loras} at once")
    for name in loras:
        checks.text(_HERE, "the name of a LoRA", name, empty=False)
    return {
        name: _between(f"strength of {name[:60]}", weight, -limits.strength, limits.strength)
        for name, weight in loras.items()
    }


def with_tags(order: Order, known: Mapping[str, Any]) -> Order:
    """The order with the LoRAs that are named in its prompt; those win over the list's strengths.

    Raises:
        CmloraError: see `cmlora.ui.prompts.tags`.
    """
    prompt, named = tags(order.prompt, known)
    return replace(order, prompt=prompt, loras={**order.loras, **named})


def read_options(text: str) -> dict[str, str]:
    """Options of a method from ``key=value`` pairs separated by semicolons or new lines.

    Raises:
        CmloraError: for a part without an equals sign, or a key that comes twice.

    >>> read_options("tau=3; order=high_first")
    {'tau': '3', 'order': 'high_first'}
    """
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in re.split(r"[;\n]", text or ""))):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not (key and sign and value):
            raise CmloraError(f"option {part[:60]!r}: expected KEY=VALUE, several with ;")
        if key in found:
            raise CmloraError(f"option {key!r} is given twice")
        found[key] = value
    return found


def read_seeds(text: str, limits: Limits) -> tuple[int, ...]:
    """Seeds from numbers and ranges separated by commas.

    Raises:
        CmloraError: if a part is neither, a seed comes twice, or there are too many.

    >>> read_seeds("0-2, 7", Limits())
    (0, 1, 2, 7)
    """
    found: list[int] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:\s*-\s*(\d{1,18}))?\s*", part)
        if match is None:
            raise CmloraError(f"seeds {str(text)[:60]!r}: expected numbers such as 0-3 or 1,5")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= limits.cells:
            raise CmloraError(f"seeds: {part.strip()} is no range of up to {limits.cells} seeds")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise CmloraError(f"seeds {str(text)[:60]!r}: a seed is listed twice")
    return tuple(found)


def read_numbers(what: str, text: str) -> tuple[float, ...]:
    """Different numbers separated by commas.

    Raises:
        CmloraError: if a part is no number, or comes twice.

    >>> read_numbers("strengths", "0.5, 1")
    (0.5, 1.0)
    """
    try:
        found = tuple(checks.real(_HERE, what, float(part)) for part in str(text).split(","))
    except ValueError:
        raise CmloraError(
            f"{what} {str(text)[:60]!r}: expected numbers separated by commas"
        ) from None
    if len(set(found)) < len(found):
        raise CmloraError(f"{what} {str(text)[:60]!r}: a number is listed twice")
    return found


def _whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number in its bounds; pages send 30.0 for 30."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    checks.whole(_HERE, name, value, least, most)
    number: int = value
    return number


def _between(name: str, value: Any, low: float, high: float) -> float:
    number = checks.real(_HERE, name, value)
    if not low <= number <= high:
        raise CmloraError(f"{_HERE}: {name} is {number:g}, not between {low:g} and {high:g}")
    return number
