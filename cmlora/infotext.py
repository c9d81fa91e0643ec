"""The text below a picture by which Stable Diffusion web UIs and image hosts say how it was made.

Its grammar: the prompt; ``Negative prompt:`` with what follows; one last line of ``key: value``
pairs separated by commas, where a value with a comma, a colon or a quote is a JSON string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from cmlora.errors import CmloraError

_PAIR = re.compile(r'\s*([\w][\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_LORA = re.compile(r"<lora:([^:<>]+)((?::[^:<>]*)*)>")
_LIMIT = 2**18


@dataclass(frozen=True)
class Named:
    """A LoRA that an infotext names.

    Args:
        name: of its file, without the suffix.
        weight: its strength.
        hash: some first digits of its AutoV2 or AutoV3 hash; empty if not stated.
    """

    name: str
    weight: float = 1.0
    hash: str = ""


@dataclass(frozen=True)
class Infotext:
    """What an infotext says.

    Args:
        prompt: without the tags of LoRAs.
        negative_prompt: what to avoid.
        values: the pairs of the last line, as texts.
        loras: in the order of their tags.
    """

    prompt: str
    negative_prompt: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    loras: tuple[Named, ...] = ()

    def whole(self, key: str) -> int | None:
        """A value as a whole number, if it is one.

        >>> Infotext("a cat", values={"Steps": "20"}).whole("Steps")
        20
        """
        value = self.values.get(key, "").strip()
        return int(value) if re.fullmatch(r"\d{1,20}", value) else None

    def real(self, key: str) -> float | None:
        """A value as a number, if it is one."""
        value = self.values.get(key, "").strip()
        return float(value) if re.fullmatch(r"-?\d{1,9}(\.\d{1,9})?", value) else None

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels, if stated."""
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", self.values.get("Size", "").strip())
        return (int(match[1]), int(match[2])) if match else None


def parse(text: str) -> Infotext:
    """Reads an infotext; whatever is not one is a prompt.

    Raises:
        CmloraError: if it is longer than any such text.

    >>> found = parse("a cat <lora:ink:0.5>\\nNegative prompt: blurry\\nSteps: 20, Seed: 7")
    >>> found.prompt, found.negative_prompt, found.whole("Steps"), found.loras[0].weight
    ('a cat', 'blurry', 20, 0.5)
    """
    if len(text) > _LIMIT:
        raise CmloraError(f"an infotext of {len(text)} characters is none")
    lines = text.replace("\r\n", "\n").strip().split("\n")
    values: dict[str, str] = {}
    if len(_PAIR.findall(lines[-1])) >= 3 or lines[-1].startswith("Steps:"):
        values = {key.strip(): _unquoted(value) for key, value in _PAIR.findall(lines.pop())}
    prompt: list[str] = []
    negative: list[str] | None = None
    for line in lines:
        if line.startswith("Negative prompt:"):
            negative = [*(negative or []), line.removeprefix("Negative prompt:").strip()]
        else:
            (prompt if negative is None else negative).append(line)
    pairs = (
        pair.rsplit(":", 1) for pair in values.get("Lora hashes", "").split(",") if ":" in pair
    )
    hashes = {name.strip(): digest.strip() for name, digest in pairs}
    whole = "\n".join(prompt)
    loras = [
        Named(match[1], _weight(match[2]), hashes.get(match[1], "").lower())
        for match in _LORA.finditer(whole)
    ]
    plain = re.sub(r"[ \t]{2,}", " ", _LORA.sub("", whole)).strip()
    return Infotext(plain, "\n".join(negative or []).strip(), values, tuple(loras))


def _weight(text: str) -> float:
    """The denoiser's strength: the second of two, after that of the text encoder."""
    numbers = [p for p in text.split(":") if re.fullmatch(r"-?\d{0,4}(\.\d{1,9})?", p) and p]
    return float(numbers[1] if len(numbers) > 1 else numbers[0]) if numbers else 1.0


def _unquoted(value: str) -> str:
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            found = json.loads(value)
        except ValueError:
            return value
        return found if isinstance(found, str) else value
    return value
