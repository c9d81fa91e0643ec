"""Options of a strategy are its keyword arguments; here they are checked and read from text."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cmlora.errors import CmloraError
from cmlora.plan import Strategy


@dataclass(frozen=True)
class Between:
    """The closed interval an option's number lies in; written into its annotation.

    ``tau: Annotated[int, Between(1)] = 5`` says that tau is a whole number and at least 1.
    """

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{self.low:g} or more"
        return f"{self.low:g} to {self.high:g}"


def defaults(strategy: Strategy) -> dict[str, Any]:
    """Name and default of every option of a strategy, in the order it lists them."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(strategy).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def checked(name: str, strategy: Strategy, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with values of the right kind; texts are read as a command line gives them.

    Args:
        name: the strategy's name, for messages.
        strategy: the function whose keyword arguments the options are.
        options: values, or texts such as ``"3"``, ``"true"``, ``"none"``, ``"0.5,1"``.

    Raises:
        CmloraError: for a name the strategy does not have, or a value of the wrong kind.
    """
    known = defaults(strategy)
    hints = get_type_hints(strategy, include_extras=True)
    result = {}
    for option, value in options.items():
        if option not in known:
            near = difflib.get_close_matches(option, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ";"
            listed = f"its options: {', '.join(known)}" if known else "it has no options"
            raise CmloraError(f"{name} has no option {option!r}{hint} {listed}")
        try:
            result[option] = _read(value, hints[option])
        except ValueError:
            expected = _describe(hints[option])
            raise CmloraError(
                f"{name}: {option} is {value!r}, expected {expected} (default {known[option]!r})"
            ) from None
    return result


def _read(value: Any, hint: Any) -> Any:
    """`value` as one of `hint`'s kind; ValueError if it is none."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        number = _read(value, arguments[0])
        for limit in arguments[1:]:
            if number is not None and not limit.low <= number <= limit.high:
                raise ValueError
        return number
    if origin in (Union, UnionType):
        for kind in arguments:
            try:
                return _read(value, kind)
            except ValueError:
                continue
        raise ValueError
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError
    if origin is tuple:
        parts = value.strip("()[] ").split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)):
            raise ValueError
        return tuple(_read(part, arguments[0]) for part in parts)
    return _read_plain(value, hint)


def _read_plain(value: Any, kind: Any) -> Any:
    text = value.strip().lower() if isinstance(value, str) else None
    if kind is type(None):
        if value is None or text == "none":
            return None
    elif kind is bool:
        if isinstance(value, bool):
            return value
        if text in ("true", "false"):
            return text == "true"
    elif not isinstance(value, bool):
        try:
            number = kind(text if text is not None else value)
        except (TypeError, OverflowError):
            raise ValueError from None
        same = text is not None or number == value
        if same and math.isfinite(number):
            return number
    raise ValueError


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{_describe(arguments[0])}, {' and '.join(map(str, arguments[1:]))}"
    if origin in (Union, UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        return "numbers separated by commas"
    names = {int: "a whole number", float: "a number", bool: "true or false", type(None): "none"}
    return names[hint]
