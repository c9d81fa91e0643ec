"""Prompts: trigger words that come and go with a LoRA, and ``<lora:name:weight>``."""

import math
import re
from collections.abc import Collection, Mapping

from cmlora.errors import CmloraError
from cmlora.ui.shelf import unknown

_TAG = re.compile(r"<lora:([^:<>]+)(?::([^:<>]*))?(?::[^<>]*)?>", re.IGNORECASE)


def add_trigger(prompt: str, trigger: str) -> str:
    """The prompt with a trigger as a part of its own, unless it is there already.

    >>> add_trigger("a beach", "zorbo")
    'a beach, zorbo'
    >>> add_trigger("Zorbo on a beach", "zorbo")
    'Zorbo on a beach'
    """
    if not trigger or _words(trigger).search(prompt):
        return prompt
    return f"{prompt.rstrip().rstrip(',')}, {trigger}".lstrip(", ")


def remove_trigger(prompt: str, trigger: str) -> str:
    """The prompt without the part that is exactly the trigger; other uses of the word stay.

    >>> remove_trigger("a beach, zorbo, zorbo on a beach", "zorbo")
    'a beach, zorbo on a beach'
    """
    parts = [part.strip() for part in prompt.split(",")]
    if not trigger or trigger.lower() not in [part.lower() for part in parts]:
        return prompt
    return ", ".join(part for part in parts if part and part.lower() != trigger.lower())


def follow(
    prompt: str, before: Collection[str], after: Collection[str], triggers: Mapping[str, str]
) -> str:
    """The prompt after a change of the selection: triggers of new LoRAs in, of others out.

    Args:
        prompt: what the user has written.
        before: names that were selected.
        after: names that are selected now.
        triggers: the first trigger of every LoRA that has one, by name.

    >>> follow("a beach, pynta", ["hat"], ["cat"], {"hat": "pynta", "cat": "zorbo"})
    'a beach, zorbo'
    """
    kept = {triggers.get(name) for name in after}
    for name in before:
        trigger = triggers.get(name, "")
        if name not in after and trigger not in kept:
            prompt = remove_trigger(prompt, trigger)
    for name in after:
        if name not in before:
            prompt = add_trigger(prompt, triggers.get(name, ""))
    return prompt


def tags(prompt: str, known: Collection[str]) -> tuple[str, dict[str, float]]:
    """The prompt without its ``<lora:name:weight>`` parts, and their strengths by LoRA name.

    Args:
        prompt: as it was written.
        known: names of the LoRAs there are. A name in a subfolder is also known by its last part
            where that is unambiguous.

    Raises:
        CmloraError: if a LoRA is not there or named twice, or its weight is no number.

    >>> tags("a cat <lora:ink:0.5>, <lora:zorbo>", ["styles/ink", "zorbo"])
    ('a cat', {'styles/ink': 0.5, 'zorbo': 1.0})
    """
    found: dict[str, float] = {}
    for match in _TAG.finditer(prompt):
        name, text = match[1].strip(), (match[2] or "1").strip()
        name = _resolve(name, known)
        if name in found:
            raise CmloraError(f"prompt: LoRA {name!r} is named twice")
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise CmloraError(f"prompt: {match[0]}: {text!r} is not a number; as in <lora:ink:0.8>")
        found[name] = weight
    if not found:
        return prompt, {}
    rest = re.sub(r"\s+", " ", _TAG.sub("", prompt))
    return re.sub(r" ?,( ?,)*", ",", rest).strip(" ,"), found


def tagged(prompt: str, loras: Mapping[str, float]) -> str:
    """The prompt with its LoRAs written into it, as other programs read them.

    >>> tagged("a cat", {"styles/ink": 0.5})
    'a cat <lora:ink:0.5>'
    """
    return " ".join(
        [prompt, *(f"<lora:{name.rsplit('/', 1)[-1]}:{w:g}>" for name, w in loras.items())]
    ).strip()


def _resolve(name: str, known: Collection[str]) -> str:
    if name in known:
        return name
    ends = [full for full in known if full.rsplit("/", 1)[-1] == name]
    if len(ends) > 1:
        raise CmloraError(f"prompt: LoRA {name!r} may be {' or '.join(sorted(ends))}; say which")
    if not ends:
        raise CmloraError(f"prompt: {unknown('LoRA', name, known)}")
    return ends[0]


def _words(trigger: str) -> re.Pattern[str]:
    """Finds the trigger where it is not a part of another word."""
    return re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)", re.IGNORECASE)
