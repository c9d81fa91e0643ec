"""Values from outside, checked one by one; messages name the place, the field and the value."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from cmlora.errors import CmloraError


def text(where: str, name: str, value: object, *, empty: bool = True) -> None:
    """Raises `CmloraError` unless the value is a text that can be stored."""
    if not isinstance(value, str) or not (value or empty):
        raise CmloraError(
            f"{where}: {name} is {reprlib.repr(value)}, not a {'' if empty else 'non-empty '}text"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise CmloraError(f"{where}: {name} contains half a character") from None


def whole(where: str, name: str, value: object, least: int, most: int) -> None:
    """Raises `CmloraError` unless the value is a whole number from ``least`` to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise CmloraError(f"{where}: {name} is {reprlib.repr(value)}, not a whole number")
    if not least <= value <= most:
        raise CmloraError(f"{where}: {name} is {value}, not between {least} and {most}")


def real(where: str, name: str, value: object) -> float:
    """The value as a finite float, or raises `CmloraError`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise CmloraError(f"{where}: {name} is {reprlib.repr(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise CmloraError(f"{where}: {name} is {reprlib.repr(value)}, not a finite number")
    return number + 0.0  # no negative zero, whose text differs


def choice(where: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises `CmloraError` unless the value is one of the choices."""
    if value not in choices:
        allowed = ", ".join(str(choice) for choice in choices)
        raise CmloraError(f"{where}: {name} is {reprlib.repr(value)}, not one of {allowed}")


def table(where: str, name: str, value: object) -> dict[str, Any]:
    """A copy made of JSON's own types, so that what is compared is what is stored.

    Raises:
        CmloraError: if the value is no mapping from texts, or JSON has no form for it.
    """
    if not isinstance(value, Mapping):
        raise CmloraError(f"{where}: {name} is {reprlib.repr(value)}, not a table")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(_json(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CmloraError(f"{where}: {name} cannot be stored as JSON: {error}") from None
    return copy


def _json(value: object) -> object:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is not a text")
        return {key: _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, (list, tuple)) else value
