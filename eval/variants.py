"""A method together with how it is run, as one word: `cmlora[order=high_first]@nonuniform`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cmlora.caching.policy import parse
from cmlora.errors import CmloraError
from cmlora.strategies import METHODS, check_options
from cmlora.strategies.former import recorded
from cmlora.strategies.options import defaults

USUAL = (
    "naive",
    "merge",
    "switch",
    "composite",
    "switch_a",
    "gate",
    "select",
    "lorahub",
    "cmlora@nonuniform",
)
"""What is compared unless something else is asked for."""

FORM = "METHOD[KEY=VALUE,KEY=VALUE]@CACHE"
"""How a variant is written; brackets and cache may be left out."""

_LONGEST = 80


@dataclass(frozen=True)
class Variant:
    """A row of a comparison.

    Args:
        method: a name from `cmlora.strategies.METHODS`.
        cache: text of a cache policy.
        options: of the method, where they are this variant's own; checked values in the order in
            which the method lists them.
    """

    method: str
    cache: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        """The word that `read` turns back into the same variant."""
        given = ",".join(f"{key}={_text(value)}" for key, value in self.options.items())
        options = f"[{given}]" if given else ""
        return f"{self.method}{options}" + ("" if self.cache == "none" else f"@{self.cache}")

    @property
    def slug(self) -> str:
        """The label in letters that any file system takes, shortened if it is very long."""
        plain = "".join(c if c.isalnum() else "_" for c in self.label)
        if len(plain) <= _LONGEST:
            return plain
        digest = hashlib.sha256(self.label.encode()).hexdigest()
        return f"{plain[: _LONGEST - 9]}_{digest[:8]}"

    def options_with(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """Its own options, and those of a whole comparison that its method has and it does not set.

        Args:
            common: values or texts by name, for whichever method has an option of that name.

        Raises:
            CmloraError: for a value of the wrong kind.
        """
        known = defaults(METHODS[self.method].object)
        shared = {name: value for name, value in common.items() if name in known}
        options = check_options(self.method, {**shared, **self.options})
        return recorded(self.method, options, known)


def read(words: Sequence[str]) -> tuple[Variant, ...]:
    """Variants from words like ``merge``, ``cmlora@uniform:3`` or ``switch[tau=2]``.

    Raises:
        CmloraError: for an unknown method, option or policy, a value of the wrong kind, a word of
            another form, no word at all, or the same variant twice.

    >>> [variant.label for variant in read(["merge", "cmlora@nonuniform", "switch@none"])]
    ['merge', 'cmlora@nonuniform', 'switch']
    >>> read(["cmlora[decay=.80, order=low_first]@uniform:2"])[0].label
    'cmlora[order=low_first,decay=0.8]@uniform:2'
    """
    if not words:
        raise CmloraError(f"no method given; for example {','.join(USUAL)}")
    found: dict[Any, Variant] = {}
    for word in words:
        variant = _read(word)
        filled = {**defaults(METHODS[variant.method].object), **variant.options}
        same = (variant.method, variant.cache, repr(filled))
        if same in found:
            known, label = found[same].label, variant.label
            if known == label:
                raise CmloraError(f"method {label!r} is listed twice")
            raise CmloraError(f"{known!r} and {label!r} are the same: what one sets is the default")
        found[same] = variant
    return tuple(found.values())


def canonical(word: str) -> str:
    """The label of the variant that a word means.

    >>> canonical("switch[ tau = 2 ]")
    'switch[tau=2]'
    """
    return _read(word).label


def _read(word: str) -> Variant:
    """One word; see `read`."""
    name, bracket, rest = word.partition("[")
    if not bracket:
        name, _, cache = word.partition("@")
        if "]" in word:
            raise CmloraError(f"{word!r}: ']' closes no bracket; write {FORM}")
        return _variant(name, {}, cache)
    if "@" in name:
        raise CmloraError(f"{word!r}: options go before the cache policy, as in {FORM}")
    inside, closed, after = rest.partition("]")
    if not closed:
        raise CmloraError(f"{word!r}: the bracket is not closed; write {FORM}")
    after = after.strip()
    if after and not after.startswith("@"):
        raise CmloraError(f"{word!r}: {after!r} follows the bracket; write {FORM}")
    return _variant(name, _pairs(word, inside), after[1:])


def _variant(name: str, options: Mapping[str, str], cache: str) -> Variant:
    method = METHODS[name.strip()].name
    checked = check_options(method, options)
    ordered = {key: checked[key] for key in defaults(METHODS[method].object) if key in checked}
    return Variant(method, parse(cache.strip() or "none").name, ordered)


def _pairs(word: str, text: str) -> dict[str, str]:
    """What stands in the brackets; a comma that no KEY= follows belongs to the value."""
    found: dict[str, str] = {}
    for part in re.split(r",(?=\s*\w+\s*=)", text):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not (key and sign and value):
            raise CmloraError(f"{word!r}: {part.strip()!r} is not KEY=VALUE")
        if key in found:
            raise CmloraError(f"{word!r}: {key} is given twice")
        found[key] = value
    return found


def _text(value: Any) -> str:
    """An option's value as `cmlora.strategies.options.checked` reads it."""
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return str(value)
