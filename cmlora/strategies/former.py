"""Defaults that have changed, so that a recipe means today what it meant when it was written.

A recipe holds the options that were given. One that it does not name has the value that was the
default when the method was new; where the default is another one today, it is written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

FORMER: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gate": MappingProxyType({"strength": 1.5, "sharpness": 4.0, "common": 1.0}),
        "select": MappingProxyType({"keep": "label", "spread": 0.9}),
    }
)
"""By method, the first defaults of options that have another one now."""


def recorded(method: str, options: Mapping[str, Any], today: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a recipe holds them.

    Args:
        method: its name.
        options: that were given.
        today: the method's present defaults.

    >>> recorded("gate", {"sharpness": 2.0}, {"strength": 1.0, "sharpness": 8.0, "common": 0.7})
    {'strength': 1.0, 'sharpness': 2.0, 'common': 0.7}
    """
    return {**{name: today[name] for name in FORMER.get(method, {})}, **options}


def recalled(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a recipe means them.

    >>> recalled("gate", {"sharpness": 2.0})
    {'strength': 1.5, 'sharpness': 2.0, 'common': 1.0}
    """
    return {**FORMER.get(method, {}), **options}
