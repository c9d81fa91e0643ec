"""One LoRA of a recipe: which files it is, and everything the method was told of it."""

from __future__ import annotations

from dataclasses import dataclass

from cmlora import checks, denoisers
from cmlora.errors import CmloraError
from cmlora.plan import Role, Scope


@dataclass(frozen=True)
class Companion:
    """A further file of a LoRA: trainers of Wan 2.2 write one for each of its denoisers.

    Args:
        file: its name, without the folder.
        sha256: of the file, 64 hex digits.
        into: the denoisers it goes into.
        weight: its strength relative to the LoRA's.

    Raises:
        CmloraError: if a value has the wrong type or is impossible.
    """

    file: str
    sha256: str
    into: tuple[str, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        where = f"companion {self.file!r} of a LoRA of the recipe"
        _check_file(where, self.file, self.sha256)
        object.__setattr__(self, "into", _denoisers(where, self.into))
        if not self.into:
            raise CmloraError(f"{where}: into is empty; name the denoisers it goes into")
        object.__setattr__(self, "weight", checks.real(where, "weight", self.weight))


@dataclass(frozen=True)
class Ingredient:
    """One LoRA of a recipe.

    Args:
        name: the adapter's name; decides the order of summation.
        file: name of its file, without the folder; empty if it came from none.
        sha256: of the file, 64 hex digits; empty if it came from none.
        weight: the user's strength.
        role: the user's label of its frequency class.
        category: what it draws.
        frequency: the measured high-frequency share that ordered it, 0 to 1, if there was one.
        window: the measured part of the run in which it acts, as fractions.
        scope: the user's label ``global`` or ``local``.
        relevance: how much the prompt speaks of it, if that was weighed.
        importance: the measured size of its contribution over the run, (fraction, size) pairs.
        into: the denoisers its file goes into, where it was said; empty where the file decides.
        companions: further files of it, for other denoisers.
        config: SHA-256 of the ``adapter_config.json`` beside its file that its strength comes from,
            64 hex digits; empty if there is none.

    Raises:
        CmloraError: if a value has the wrong type or is impossible.
    """

    name: str
    file: str = ""
    sha256: str = ""
    weight: float = 1.0
    role: Role | None = None
    category: str | None = None
    frequency: float | None = None
    window: tuple[float, float] | None = None
    scope: Scope | None = None
    relevance: float | None = None
    importance: tuple[tuple[float, float], ...] | None = None
    into: tuple[str, ...] = ()
    companions: tuple[Companion, ...] = ()
    config: str = ""

    def __post_init__(self) -> None:
        where = f"LoRA {self.name!r} of the recipe"
        checks.text(where, "name", self.name, empty=False)
        _check_file(where, self.file, self.sha256)
        _check_hash(where, "config", self.config)
        object.__setattr__(self, "into", _denoisers(where, self.into))
        object.__setattr__(self, "companions", _companions(where, self.companions))
        object.__setattr__(self, "weight", checks.real(where, "weight", self.weight))
        checks.choice(where, "role", self.role, (None, "high", "low"))
        if self.category is not None:
            checks.text(where, "category", self.category)
        if self.frequency is not None:
            object.__setattr__(self, "frequency", checks.real(where, "frequency", self.frequency))
        if self.window is not None:
            if not isinstance(self.window, (tuple, list)) or len(self.window) != 2:
                raise CmloraError(f"{where}: window is {self.window!r}, not (start, end)")
            edges = tuple(checks.real(where, "window", edge) for edge in self.window)
            object.__setattr__(self, "window", edges)
        checks.choice(where, "scope", self.scope, (None, "global", "local"))
        if self.relevance is not None:
            object.__setattr__(self, "relevance", checks.real(where, "relevance", self.relevance))
        if self.importance is not None:
            object.__setattr__(self, "importance", _points(where, self.importance))


def _check_file(where: str, file: str, sha256: str) -> None:
    """See that a file is named without its folder and known by its content."""
    checks.text(where, "file", file)
    if "/" in file or "\\" in file:
        raise CmloraError(f"{where}: file is {file!r}, not a name without folders")
    _check_hash(where, "sha256", sha256)


def _check_hash(where: str, key: str, value: str) -> None:
    checks.text(where, key, value)
    if value and (len(value) != 64 or set(value) - set("0123456789abcdef")):
        raise CmloraError(f"{where}: {key} is {value!r}, not 64 hex digits")


def _denoisers(where: str, value: object) -> tuple[str, ...]:
    """Names of denoisers, as JSON gives them back."""
    if not isinstance(value, (tuple, list)) or not all(isinstance(name, str) for name in value):
        raise CmloraError(f"{where}: into is {value!r}, not a list of denoisers")
    try:
        return denoisers.chosen(value)
    except CmloraError as error:
        raise CmloraError(f"{where}: {error}") from None


def _companions(where: str, value: object) -> tuple[Companion, ...]:
    """Further files, as JSON gives them back."""
    rows = value if isinstance(value, (tuple, list)) else (None,)
    found: list[Companion] = []
    for row in rows:
        if isinstance(row, dict) and {"file", "sha256", "into"} <= set(row) <= _COMPANION:
            row = Companion(**row)
        if not isinstance(row, Companion):
            raise CmloraError(f"{where}: companions is {value!r}, not a list of further files")
        found.append(row)
    return tuple(sorted(found, key=lambda each: each.into))


_COMPANION = {"file", "sha256", "into", "weight"}


def _points(where: str, value: object) -> tuple[tuple[float, float], ...]:
    """Pairs of numbers, as JSON gives them back."""
    rows = value if isinstance(value, (tuple, list)) else ()
    if not rows or not all(isinstance(row, (tuple, list)) and len(row) == 2 for row in rows):
        raise CmloraError(f"{where}: importance is {value!r}, not a list of (fraction, size)")
    found = [tuple(checks.real(where, "importance", number) for number in row) for row in rows]
    return tuple((x, y) for x, y in found)
