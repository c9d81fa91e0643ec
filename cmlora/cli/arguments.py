"""Texts from the command line to values; every refusal says what was expected."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

from cmlora.errors import CmloraError
from cmlora.plan import Role, Scope

MANY = 10_000
"""More seeds than this in one command are taken for a slip of the keyboard."""


def seeds(text: str) -> tuple[int, ...]:
    """Seeds as a list of numbers and inclusive ranges, in the order given.

    Raises:
        CmloraError: if a part is neither, a range runs backwards, or a seed comes twice.

    >>> seeds("0-3")
    (0, 1, 2, 3)
    >>> seeds("1,5,9-10")
    (1, 5, 9, 10)
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or last < first or last - first >= MANY:
            raise CmloraError(f"--seeds {text!r}: {part!r} is not like 7 or 0-3")
        found += range(first, last + 1)
    if max(found) >= 2**63:
        raise CmloraError(f"--seeds {text!r}: a seed is below 2**63")
    if len(set(found)) < len(found):
        raise CmloraError(f"--seeds {text!r}: a seed is listed twice")
    return tuple(found)


def sizes(text: str) -> tuple[int, ...]:
    """How many LoRAs per set, in the same form.

    Raises:
        CmloraError: if it is not of that form.

    >>> sizes("2-4")
    (2, 3, 4)
    """
    try:
        return seeds(text)
    except CmloraError:
        raise CmloraError(f"--n {text!r}: expected numbers such as 2,3 or 2-5") from None


def listed(text: str) -> tuple[str, ...]:
    """A comma-separated list.

    >>> listed("character_1:0.8, ink")
    ('character_1:0.8', 'ink')
    """
    return tuple(part.strip() for part in text.split(",") if part.strip())


def variants(text: str) -> tuple[str, ...]:
    """A comma-separated list of methods with their options and caches.

    Commas in brackets belong to the options, and commas before a digit to a policy's numbers.

    >>> variants("merge,cmlora[decay=0.8,late=0.5]@nonuniform:2,3,switch")
    ('merge', 'cmlora[decay=0.8,late=0.5]@nonuniform:2,3', 'switch')
    """
    parts = re.split(r",(?![^\[\]]*\])(?!\s*[\d.])", text)
    return tuple(part.strip() for part in parts if part.strip())


def weighted(text: str) -> tuple[str, float]:
    """A LoRA's path or id and its weight, which follows a colon and defaults to 1.

    Raises:
        CmloraError: if the weight is not a finite number.

    >>> weighted("ink.safetensors:0.8"), weighted("character_1")
    (('ink.safetensors', 0.8), ('character_1', 1.0))
    """
    reference, colon, number = text.rpartition(":")
    if not colon or Path(text).exists() or re.search(r"[/\\]", number):
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not reference or not math.isfinite(weight):
        raise CmloraError(f"--lora {text!r}: expected PATH_OR_ID:WEIGHT with a number as weight")
    return reference, weight


def tagged(prompt: str, schedule: str, loras: Sequence[str]) -> tuple[str, str, list[str]]:
    """A prompt with LoRA tags in it, taken apart as `cmlora.schedules.parse` does.

    Returns:
        the prompt without tags, the schedule with them, and the LoRAs with those of the prompt
        that were not among them.

    >>> tagged("a cat <lora:ink:0.5>", "", ["cat:0.8"])
    ('a cat', '<lora:ink:te=0.5:unet=0.5>', ['cat:0.8', 'ink'])
    """
    if "<lora:" not in prompt:
        return prompt, schedule, list(loras)
    from cmlora.pipelines.library import adapter_name
    from cmlora.schedules.parse import parse, write_schedule

    found = parse(prompt)
    files = [Path(weighted(text)[0]) for text in loras]
    known = {file.stem for file in files} | {adapter_name(file, ()) for file in files}
    added = [name for name in found.schedule.names if name not in known]
    text = f"{schedule} {write_schedule(found.schedule)}".strip()
    return found.prompt, text, [*loras, *added]


def pairs(flag: str, texts: Sequence[str]) -> dict[str, str]:
    """`key=value` texts as a mapping.

    Raises:
        CmloraError: if there is no equals sign, no key, or a key comes twice.

    >>> pairs("--option", ["interval=5", "order=high_first"])
    {'interval': '5', 'order': 'high_first'}
    """
    found: dict[str, str] = {}
    for text in texts:
        key, sign, value = (part.strip() for part in text.partition("="))
        if not (key and sign):
            raise CmloraError(f"{flag} {text!r}: expected KEY=VALUE")
        if key in found:
            raise CmloraError(f"{flag} {key!r} is given twice")
        found[key] = value
    return found


def size(text: str) -> tuple[int, int]:
    """Width and height in pixels, from one number or WIDTHxHEIGHT.

    >>> size("768x512"), size("64")
    ((768, 512), (64, 64))
    """
    match = re.fullmatch(r"\s*(\d+)(?:\s*[xX]\s*(\d+))?\s*", text)
    if match is None:
        raise CmloraError(f"--size {text!r}: expected a number of pixels or WIDTHxHEIGHT")
    return int(match[1]), int(match[2] or match[1])


def cut(text: str) -> tuple[int, int] | None:
    """Layer and block of a cache cut; nothing for the model's default.

    >>> cut("0,-1"), cut("")
    ((0, -1), None)
    """
    if not text.strip():
        return None
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(-?\d+)\s*", text)
    if match is None:
        raise CmloraError(f"--cut {text!r}: expected LAYER,BLOCK such as 0,1")
    return int(match[1]), int(match[2])


def roles(texts: Sequence[str]) -> dict[str, Role]:
    """LoRA names with their frequency class.

    >>> roles(["ink=high"])
    {'ink': 'high'}
    """
    found: dict[str, Role] = {}
    for name, value in pairs("--role", texts).items():
        if value not in get_args(Role):
            raise CmloraError(f"--role {name}={value}: a class is high or low")
        found[name] = cast(Role, value)
    return found


def scopes(texts: Sequence[str]) -> dict[str, Scope]:
    """LoRA names with whether they change the whole picture.

    >>> scopes(["ink=global"])
    {'ink': 'global'}
    """
    found: dict[str, Scope] = {}
    for name, value in pairs("--scope", texts).items():
        if value not in get_args(Scope):
            raise CmloraError(f"--scope {name}={value}: a scope is global or local")
        found[name] = cast(Scope, value)
    return found


def places(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """LoRA names with the denoisers their files go into.

    >>> places(["ink=transformer+transformer_2"])
    {'ink': ('transformer', 'transformer_2')}
    """
    return {name: tuple(value.split("+")) for name, value in pairs("--into", texts).items()}


def seconds(texts: Sequence[str]) -> dict[str, tuple[str, float]]:
    """LoRA names with their files for the second denoiser and the strengths there.

    >>> seconds(["ink=low.safetensors:0.8"])
    {'ink': ('low.safetensors', 0.8)}
    """
    return {name: weighted(value) for name, value in pairs("--second", texts).items()}


def prompt_of(pipe: Any) -> str:
    """The trigger words of all LoRAs in a pipeline, in the order they were loaded.

    Raises:
        CmloraError: if none of their files names any.
    """
    triggers = [word for lora in pipe.loras.values() for word in lora.applied.triggers[:1]]
    if not triggers:
        raise CmloraError("no --prompt, and the LoRA files name no trigger words; say what to draw")
    return ", ".join(triggers)
