"""What a judge is asked, from a text file, and the one form of answer that is accepted."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from cmlora.errors import CmloraError

SHIPPED = ("four", "two")
BEST = 10.0
SIDES = ("first", "second")
Marks = dict[str, dict[str, float]]
"""Marks by side (first, second) and dimension."""


class Unreadable(ValueError):
    """An answer that is not in the form that was asked for; the message says what is wrong."""


@dataclass(frozen=True)
class Protocol:
    """A way of asking.

    Args:
        name: of the protocol.
        dimensions: what is marked.
        text: the question, with ``{concepts}`` where the concepts go.
    """

    name: str
    dimensions: tuple[str, ...]
    text: str

    def question(self, concepts: str) -> str:
        """The question about a set.

        Args:
            concepts: the set's trigger words, one LoRA per line.
        """
        return self.text.replace("{concepts}", concepts)

    def repair(self, why: str) -> str:
        """What is said after an answer that cannot be read."""
        form = {side: dict.fromkeys(self.dimensions, 0) for side in SIDES}
        return (
            f"I cannot use that answer: {why}. Answer again, with one JSON object and nothing "
            f"else, in exactly this form, with your marks in place of the zeros:\n"
            f"{json.dumps(form)}"
        )

    def digest(self) -> str:
        """A short hash of the question and the dimensions."""
        text = json.dumps([self.dimensions, self.text])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def read(self, answer: str) -> Marks:
        """Marks from an answer.

        The answer is one JSON object, alone or in one code fence, with exactly the two sides and
        on each side exactly the dimensions, as numbers from 0 to 10.

        Raises:
            Unreadable: if it is anything else.
        """
        text = answer.strip()
        fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?\s*```", text, re.DOTALL)
        try:
            table = json.loads(fenced[1] if fenced else text, object_pairs_hook=_once)
        except Unreadable:
            raise
        except (ValueError, RecursionError):
            raise Unreadable("it is not a JSON object and nothing else") from None
        if not isinstance(table, dict) or set(table) != set(SIDES):
            raise Unreadable("it does not have exactly the keys first and second")
        return {side: self._side(side, table[side]) for side in SIDES}

    def _side(self, side: str, table: object) -> dict[str, float]:
        if not isinstance(table, dict) or set(table) != set(self.dimensions):
            listed = ", ".join(self.dimensions)
            raise Unreadable(f"{side} does not have exactly the keys {listed}")
        found = {}
        for name in self.dimensions:
            value = table[name]
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not 0 <= value <= BEST:
                raise Unreadable(f"{name} of {side} is {value!r}, not a number from 0 to 10")
            found[name] = float(value)
        return found


def find_protocol(name: str | Path) -> Protocol:
    """A protocol by its shipped name, or from a text file of your own.

    The file begins with a line ``# dimensions: one, two`` and contains ``{concepts}`` once.

    Raises:
        CmloraError: if there is none, or the file is not like that.
    """
    if str(name) in SHIPPED:
        source = resources.files("cmlora.eval").joinpath("data", "judge", f"{name}.txt")
        return _parsed(str(name), source.read_text("utf-8"))
    path = Path(name).expanduser()
    if not path.is_file():
        raise CmloraError(f"no protocol {str(name)!r}: give {', '.join(SHIPPED)}, or a text file")
    return _parsed(path.stem, path.read_text("utf-8"))


def _parsed(name: str, text: str) -> Protocol:
    head: dict[str, str] = {}
    lines = text.splitlines()
    while lines and lines[0].startswith("#"):
        key, _, value = lines.pop(0)[1:].partition(":")
        head[key.strip()] = value.strip()
    dimensions = tuple(re.findall(r"\w+", head.get("dimensions", "")))
    body = "\n".join(lines).strip()
    if not dimensions or len(set(dimensions)) < len(dimensions):
        raise CmloraError(f"protocol {name}: its first line is not like '# dimensions: one, two'")
    if body.count("{concepts}") != 1:
        raise CmloraError(f"protocol {name}: the text does not contain {{concepts}} exactly once")
    return Protocol(name, dimensions, body)


def _once(pairs: list[tuple[str, object]]) -> Mapping[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise Unreadable("a key is there twice")
    return table
