"""Ranks and scales of a LoRA as PEFT's `LoraConfig` states them, and back.

Diffusers has them in the header of the file, PEFT itself in a file of its own beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cmlora.errors import CmloraError
from cmlora.lora import Update

BESIDE = "adapter_config.json"
"""Where PEFT writes what `scales` finds in diffusers' headers."""

_ADAPTER = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LIMIT = 2**20

_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")
_STEP = re.compile(r"([\w-]|\\?\.|\\d|\[0-9\])([*+?]?)")
_SIMPLE = re.compile(rf"\^?(?:{_STEP.pattern})+\$?")
_TENSOR = re.compile(r"\.(lora|hada|lokr|oft|boft|miss|ia3)_")


def config(updates: Mapping[str, Update], *, anchored: bool = True) -> dict[str, Any]:
    """The arguments of the `LoraConfig` of one model, exact for every module.

    Args:
        updates: by module name within the model.
        anchored: patterns match the whole name; otherwise also behind a prefix that ends in a dot.
    """
    ranks = {name: update.rank for name, update in updates.items()}
    alphas = {name: alpha(update.scale, update.rank) for name, update in updates.items()}
    rank, usual = _most_common(ranks), _most_common(alphas)
    # Without the anchor a short name such as proj_out would also set what only ends like it.
    start = "^" if anchored else ""
    return {
        "r": rank,
        "lora_alpha": usual,
        "rank_pattern": {start + name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {start + name: a for name, a in alphas.items() if a != usual},
        "target_modules": sorted(updates),
    }


def alpha(scale: float, rank: int) -> float:
    """The alpha for which ``alpha / rank`` is ``scale``, to the bit wherever such a number exists.

    >>> alpha(1 / 3, 3)
    1.0
    """
    near = scale * rank
    candidates = [float(round(near)), near, math.nextafter(near, 0), math.nextafter(near, math.inf)]
    return next((a for a in candidates if a / rank == scale), near)


def scales(text: str | None, where: str) -> Mapping[str, Mapping[str, Any]]:
    """The configuration of every component from a file's ``lora_adapter_metadata``.

    Args:
        text: the entry of the header, if there is one.
        where: the file, for messages.

    Raises:
        CmloraError: if it is not what diffusers writes, or has a pattern that is not read.
    """
    place = f"{where}: lora_adapter_metadata in the header"
    configs: dict[str, dict[str, Any]] = {}
    for key, value in _table(text or "{}", place, strict=False).items():
        component, _, option = key.rpartition(".")
        configs.setdefault(component, {})[option] = value
    for component, settings in configs.items():
        _check(settings, place, f"{' '.join(component.split())}." if component else "")
    return configs


def tuners(text: str | None) -> set[str]:
    """The tuners that a file's ``lora_adapter_metadata`` names, as PEFT calls them.

    >>> sorted(tuners('{"unet.peft_type": "LORA", "unet.r": 4}'))
    ['LORA']
    """
    try:
        table = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return set()
    found = table.items() if isinstance(table, dict) else ()
    return {str(value).upper() for key, value in found if key.rpartition(".")[2] == "peft_type"}


def of_folder(path: str | os.PathLike[str], keys: Iterable[str]) -> bool:
    """Whether a file is one of those that PEFT writes into a folder, to which `BESIDE` belongs."""
    return Path(path).name == _ADAPTER or any(key.startswith(_PREFIX) for key in keys)


class Beside(NamedTuple):
    """What a file of PEFT's has beside it.

    Args:
        settings: the configuration; empty if there is none.
        sha256: of its file, 64 hex digits; empty if there is none.
        reason: why there is none; empty if there is one.
    """

    settings: dict[str, Any]
    sha256: str
    reason: str


def beside(path: str | os.PathLike[str], ranks: Iterable[int]) -> Beside:
    """The configuration of a file from `BESIDE`, or why there is none.

    Args:
        path: of the file with the tensors.
        ranks: of the file's LoRAs, which tell whether the configuration is that of another file.

    Raises:
        CmloraError: if what is there cannot be read or is no configuration.
    """
    place = Path(path).parent / BESIDE
    if not place.is_file():
        return Beside({}, "", f"there is no {BESIDE} beside it")
    try:
        with place.open("rb") as file:
            data = file.read(_LIMIT + 1)
    except OSError as error:
        raise CmloraError(f"cannot read {place}: {error.strerror}") from None
    if len(data) > _LIMIT:
        raise CmloraError(
            f"{place} is larger than {_LIMIT} bytes, which no configuration of PEFT is; "
            "download it again"
        )
    settings = _table(data, str(place), strict=True)
    _check(settings, str(place), "")
    stated = [settings.get("r") or 8, *(settings.get("rank_pattern") or {}).values()]
    others = sorted(set(ranks) - {float(each) for each in stated})
    if others and str(settings.get("peft_type", "LORA")).upper() == "LORA":
        reason = f"{place} is of another LoRA, of rank {stated[0]} and not {others[0]}"
        return Beside({}, "", reason)
    return Beside(settings, hashlib.sha256(data).hexdigest(), "")


def module_of(key: str) -> str:
    """What PEFT calls the module of a key in one of its own files.

    >>> module_of("base_model.model.mid_block.attentions.0.proj_in.lora_A.weight")
    'mid_block.attentions.0.proj_in'
    """
    return _TENSOR.split(key.removeprefix(_PREFIX))[0]


def scale(settings: Mapping[str, Any], names: Iterable[str], rank: int) -> float:
    """The scale of one module under a configuration; 1 if there is no configuration.

    Args:
        settings: the configuration.
        names: what the module may be called in it.
        rank: of its update.
    """
    if not settings:
        return 1.0
    usual = settings.get("lora_alpha", settings.get("alpha", 8))  # PEFT's own default
    value = float(_of_module(settings, "alpha_pattern", names, usual))
    return value / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def rank_of(settings: Mapping[str, Any], names: Iterable[str]) -> int:
    """The rank of one module under a configuration, which the tensors of whole LoKr do not tell.

    Args:
        settings: the configuration.
        names: what the module may be called in it.
    """
    return int(_of_module(settings, "rank_pattern", names, settings.get("r") or 8))


def _of_module(settings: Mapping[str, Any], table: str, names: Iterable[str], usual: Any) -> Any:
    """What a table of patterns says of a module; the first pattern counts, as in PEFT."""
    names = list(names)
    for pattern, found in (settings.get(table) or {}).items():
        if any(matches(pattern, name) for name in names):
            return found
    return usual


def settled(patterns: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    r"""A table of patterns as one of modules, each by its whole name, with nothing to look for.

    Args:
        patterns: a ``rank_pattern`` or ``alpha_pattern``; the first that means a module counts.
        modules: names of the modules that there are.

    Raises:
        CmloraError: for a pattern that is not read, see `matches`.

    >>> settled({"attn2.*": 3, "to_q": 5}, ["attn1.to_q", "attn2.to_q"])
    {'^attn1\\.to_q$': 5, '^attn2\\.to_q$': 3}
    """
    for pattern in patterns:
        if not _SIMPLE.fullmatch(pattern):
            raise CmloraError(f"{pattern!r} is a regular expression that is not read")
    found = {}
    for module in sorted(modules):
        values = [value for pattern, value in patterns.items() if matches(pattern, module)]
        if values:
            found["^" + module.replace(".", r"\.") + "$"] = values[0]
    return found


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of a configuration means a module, by its name or by how the name ends.

    The time is at most the product of the lengths, whatever the pattern is.

    Args:
        pattern: a regular expression made of characters, ``.``, ``\\d`` and ``[0-9]``, each of them
            perhaps with ``*``, ``+`` or ``?`` behind it.
        name: of the module.

    >>> matches(r"attn\\d+.*to_q", "mid_block.attn2.processor.to_q")
    True
    """
    anchored, body = pattern.startswith("^"), pattern.removeprefix("^").removesuffix("$")
    if _PLAIN.fullmatch(pattern):  # there may be one for every module
        plain = body.replace("\\", "")
        return name == plain or (not anchored and name.endswith(f".{plain}"))
    steps = [(match[1], match[2]) for match in _STEP.finditer(body)]

    def onwards(places: Iterable[int]) -> set[int]:
        found = set()
        for place in places:
            found.add(place)
            while place < len(steps) and steps[place][1] in ("*", "?"):
                place += 1
                found.add(place)
        return found

    reached: set[int] = set()
    for index, character in enumerate(name):
        if not index or (not anchored and name[index - 1] == "."):
            reached |= onwards([0])
        after = set()
        for place in reached:
            if place < len(steps) and _fits(steps[place][0], character):
                again = steps[place][1] in ("*", "+")
                after |= {place, place + 1} if again else {place + 1}
        reached = onwards(after)
    return len(steps) in reached


def _fits(step: str, character: str) -> bool:
    if step in (r"\d", "[0-9]"):
        return character.isdecimal()
    return step == "." or step.removeprefix("\\") == character


def _table(text: str | bytes, place: str, *, strict: bool) -> dict[str, Any]:
    """A JSON object; unless strict, numbers may be as Python writes them, infinite or none.

    Raises:
        CmloraError: if it is none.
    """
    try:
        found = json.loads(text, parse_constant=_refuse if strict else None)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CmloraError(f"{place} is damaged: it is no table in JSON; download it again")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check(settings: Mapping[str, Any], place: str, front: str) -> None:
    """Raises `CmloraError` unless what is read of a configuration later can be read."""
    stated = {key: settings[key] for key in ("lora_alpha", "alpha") if key in settings}
    for option in ("r", "num_cayley_neumann_terms", "eps"):
        stated[option] = settings.get(option) or 0
    for table in ("alpha_pattern", "rank_pattern"):
        patterns = settings.get(table) or {}
        if not isinstance(patterns, dict):
            found = reprlib.repr(patterns)
            raise CmloraError(
                f"{place} is damaged: {front}{table} is {found}, not a table; download it again"
            )
        stated |= {f"{table} of {pattern!r}": value for pattern, value in patterns.items()}
    for name, value in stated.items():
        try:
            float(value)
        except (TypeError, ValueError, OverflowError):
            raise CmloraError(
                f"{place} is damaged: {front}{name} is {reprlib.repr(value)}, not a number that "
                "can be used; download it again"
            ) from None
    # The ranks of all but LoKr are those of the tensors, whatever a pattern says.
    lokr = str(settings.get("peft_type", "")).upper() == "LOKR"
    for table in ("alpha_pattern", "rank_pattern") if lokr else ("alpha_pattern",):
        for pattern in settings.get(table) or {}:
            if _SIMPLE.fullmatch(pattern):
                continue
            raise CmloraError(
                f"{place}: {front}{table} holds the regular expression {pattern!r}, which is not "
                "read: one of a stranger's file could run for hours; write it with names of "
                r"layers, in which . \d and .* may stand"
            )


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
