"""One LoRA of a recipe: which file it is, and everything the method was told of it."""

from __future__ import annotations

from dataclasses import dataclass

from cmlora import checks
from cmlora.errors import CmloraError
from cmlora.plan import Role, Scope


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

    def __post_init__(self) -> None:
        where = f"LoRA {self.name!r} of the recipe"
        checks.text(where, "name", self.name, empty=False)
        checks.text(where, "file", self.file)
        if "/" in self.file or "\\" in self.file:
            raise CmloraError(f"{where}: file is {self.file!r}, not a name without folders")
        checks.text(where, "sha256", self.sha256)
        if self.sha256 and (len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef")):
            raise CmloraError(f"{where}: sha256 is {self.sha256!r}, not 64 hex digits")
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


def _points(where: str, value: object) -> tuple[tuple[float, float], ...]:
    """Pairs of numbers, as JSON gives them back."""
    rows = value if isinstance(value, (tuple, list)) else ()
    if not rows or not all(isinstance(row, (tuple, list)) and len(row) == 2 for row in rows):
        raise CmloraError(f"{where}: importance is {value!r}, not a list of (fraction, size)")
    found = [tuple(checks.real(where, "importance", number) for number in row) for row in rows]
    return tuple((x, y) for x, y in found)
