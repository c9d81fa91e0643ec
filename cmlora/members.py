"""The LoRAs a user names, checked and described for the strategies."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from cmlora.errors import CmloraError
from cmlora.plan import Member, Role, Scope
from cmlora.switching import AdapterSwitch

if TYPE_CHECKING:
    from cmlora.frequency.profile import Profile


def described(
    loras: Sequence[str] | Mapping[str, float],
    members: Sequence[Member] | None,
    roles: Mapping[str, Role],
    profiles: Mapping[str, Profile],
    scopes: Mapping[str, Scope] | None = None,
    triggers: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Member, ...]:
    """The LoRAs as strategies see them, in the user's order.

    Args:
        loras: their names, or names with strengths.
        members: full descriptions of the same LoRAs, or ``None``.
        roles: the user's labels of frequency classes.
        profiles: measured profiles.
        scopes: the user's labels of what changes the whole picture.
        triggers: trigger words.

    Raises:
        CmloraError: for names that are unknown or doubled, and values that make no sense.
    """
    if isinstance(loras, str):
        raise CmloraError(f"loras={loras!r}: expected a list of names, such as [{loras!r}]")
    names = list(loras)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CmloraError(f"{', '.join(twice)}: listed more than once")
    strengths = loras if isinstance(loras, Mapping) else dict.fromkeys(names, 1.0)
    if members is None:
        members = [Member(name, strengths[name]) for name in names]
    elif sorted(member.name for member in members) != sorted(names):
        listed = ", ".join(member.name for member in members)
        raise CmloraError(f"members describe {listed}, but loras are {', '.join(names)}")
    scopes, triggers = scopes or {}, triggers or {}
    said = {"roles": roles, "profiles": profiles, "scopes": scopes, "triggers": triggers}
    for what, given in said.items():
        for name in given:
            if name not in names:
                raise CmloraError(f"{what}: {unknown(name, names, 'composed')}")
    result: list[Member] = []
    for member in members:
        weight, role = member.weight, roles.get(member.name, member.role)
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise CmloraError(f"{member.name}: weight {weight!r} is not a number")
        if not math.isfinite(weight):
            raise CmloraError(f"{member.name}: weight {weight} is not finite")
        if role not in (None, *get_args(Role)):
            raise CmloraError(f"{member.name}: role {role!r}; expected 'high' or 'low'")
        scope = scopes.get(member.name, member.scope)
        if scope not in (None, *get_args(Scope)):
            raise CmloraError(f"{member.name}: scope {scope!r}; expected 'global' or 'local'")
        words = triggers.get(member.name, member.triggers)
        if isinstance(words, str):
            raise CmloraError(f"{member.name}: triggers {words!r}; expected a list of words")
        profile = profiles.get(member.name)
        if profile is not None:
            member = replace(
                member,
                frequency=profile.frequency,
                window=profile.window,
                importance=profile.importance,
            )
        known = replace(member, weight=float(weight), role=role, scope=scope)
        result.append(replace(known, triggers=tuple(words)))
    return tuple(result)


def check_loaded(
    members: Sequence[Member], switches: Sequence[AdapterSwitch], *, needed: bool
) -> None:
    """See that every member is loaded, and that there are some if the method needs any.

    Args:
        members: the LoRAs of a composition.
        switches: of the models they are loaded in.
        needed: whether the method uses LoRAs.

    Raises:
        CmloraError: naming what is loaded.
    """
    loaded = sorted({name for switch in switches for name in switch.names})
    if not members and needed:
        raise CmloraError(
            f"no LoRAs to compose; name some of those that are loaded: {', '.join(loaded)}"
            if loaded
            else "no LoRAs to compose, and none are loaded; call pipe.load_lora_weights first"
        )
    for member in members:
        if not loaded:
            raise CmloraError(
                f"unknown LoRA {member.name!r}: the pipeline has no LoRAs loaded; "
                "call pipe.load_lora_weights(..., adapter_name=...) first"
            )
        if member.name not in loaded:
            raise CmloraError(unknown(member.name, loaded, "loaded"))


def unknown(name: str, known: Iterable[str], state: str) -> str:
    """What to say about a LoRA that is not there."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown LoRA {name!r}; {hint}{state}: {', '.join(known)}"
