"""A read-only table of named methods: the same for every zoo of the project."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from cmlora.errors import CmloraError

T = TypeVar("T")


class UnknownName(CmloraError, KeyError):
    """A name that is not in a registry; the message lists near names and all names."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One row of a registry.

    Args:
        name: the lowercase word that is the file, the function and the command line value.
        object: the method itself.
        sentence: what it does, in one sentence without a full stop.
        paper: where it comes from, for example ``arXiv:2502.04923``; empty for our own.
    """

    name: str
    object: T
    sentence: str
    paper: str = ""


class Registry(Mapping[str, Entry[T]], Generic[T]):
    """Entries by name, in the order they were listed.

    Args:
        kind: what the entries are, in the singular ("composition method"); used in messages.
        entries: the rows.

    Raises:
        ValueError: if two rows have the same name.

    >>> methods = Registry("number", Entry("one", 1, "the unit"), Entry("two", 2, "the pair"))
    >>> methods["two"].object
    2
    >>> methods["tow"]
    Traceback (most recent call last):
    ...
    cmlora.registry.UnknownName: unknown number 'tow'; did you mean two? known: one, two
    """

    def __init__(self, kind: str, *entries: Entry[T]) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}
        for entry in entries:
            if entry.name in self._entries:
                raise ValueError(f"{kind} {entry.name!r} is listed twice")
            self._entries[entry.name] = entry

    def __getitem__(self, name: str) -> Entry[T]:
        try:
            return self._entries[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._entries, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ";"
            known = ", ".join(self._entries)
            message = f"unknown {self.kind} {name!r}{hint} known: {known}"
            raise UnknownName(message) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def table(self) -> str:
        """The registry as a Markdown table with one row per entry."""
        rows = [f"| `{e.name}` | {e.sentence} | {e.paper} |" for e in self._entries.values()]
        return "\n".join(["| name | what it does | source |", "|---|---|---|", *rows])
