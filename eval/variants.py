"""A method together with how it is run, as one word: `cmlora@nonuniform`."""

from collections.abc import Sequence
from dataclasses import dataclass

from cmlora.caching.policy import parse
from cmlora.errors import CmloraError
from cmlora.strategies import METHODS

USUAL = (
    "naive",
    "merge",
    "switch",
    "composite",
    "switch_a",
    "select",
    "lorahub",
    "cmlora@nonuniform",
)
"""What is compared unless something else is asked for."""


@dataclass(frozen=True)
class Variant:
    """A row of a comparison.

    Args:
        method: a name from `cmlora.strategies.METHODS`.
        cache: text of a cache policy.
    """

    method: str
    cache: str = "none"

    @property
    def label(self) -> str:
        """The word that `read` turns back into the same variant."""
        return self.method if self.cache == "none" else f"{self.method}@{self.cache}"

    @property
    def slug(self) -> str:
        """The label in letters that any file system takes."""
        return "".join(c if c.isalnum() else "_" for c in self.label)


def read(words: Sequence[str]) -> tuple[Variant, ...]:
    """Variants from words like ``merge`` or ``cmlora@uniform:3``.

    Raises:
        CmloraError: for an unknown method or policy, no word at all, or the same variant twice.

    >>> [variant.label for variant in read(["merge", "cmlora@nonuniform", "switch@none"])]
    ['merge', 'cmlora@nonuniform', 'switch']
    """
    if not words:
        raise CmloraError(f"no method given; for example {','.join(USUAL)}")
    found: list[Variant] = []
    for word in words:
        method, _, cache = word.partition("@")
        variant = Variant(METHODS[method].name, parse(cache or "none").name)
        if variant in found:
            raise CmloraError(f"method {variant.label!r} is listed twice")
        found.append(variant)
    return tuple(found)
