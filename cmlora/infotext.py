"""The text below a picture by which Stable Diffusion web UIs and image hosts say how it was made.

Its grammar: the prompt; ``Negative prompt:`` with what follows; one last line of ``key: value``
pairs separated by commas, where a value with a comma, a colon or a quote is a JSON string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cmlora.errors import CmloraError
from cmlora.schedules.parse import parse_schedule, write_schedule
from cmlora.schedules.schedule import Schedule, Track
from cmlora.schedules.tags import ScheduleError, read_tag, write_tag

_PAIR = re.compile(r'\s*([\w][\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_LORA = re.compile(r"<lora:([^:<>]+)((?::[^:<>]*)*)>")
_LIMIT = 2**18
_MANY = 32  # arguments of a tag; there are fewer kinds


@dataclass(frozen=True)
class Named:
    """A LoRA that an infotext names.

    Args:
        name: of its file, without the suffix.
        weight: its strength, which `schedule` multiplies.
        hash: some first digits of its AutoV2 or AutoV3 hash; empty if not stated.
        schedule: its tag as `cmlora.schedules` writes it, if that says more than one strength.
        left: what its tag says besides, which only the other program understands.
        wrong: why no strength can be read from its tag; empty if one can.
    """

    name: str
    weight: float = 1.0
    hash: str = ""
    schedule: str = ""
    left: tuple[str, ...] = ()
    wrong: str = ""


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

    def schedule(self, names: Sequence[str]) -> str:
        """The strengths and curves of all tags that say more than one number.

        Args:
            names: what the LoRAs are called in the pipeline, in the order of their tags.

        Raises:
            CmloraError: if the strength of one cannot be read.

        >>> parse("a cat <lora:ink:0.5:0.8> <lora:hat:1>").schedule(["ink_v2", "hat"])
        '<lora:ink_v2:te=0.5:unet=0.8>'
        """
        self.check()
        tracks: list[Track] = []
        for lora, name in zip(self.loras, names, strict=True):
            tracks += (replace(t, lora=name) for t in parse_schedule(lora.schedule).tracks)
        return write_schedule(Schedule(tuple(tracks)))

    def check(self) -> None:
        """Raises `CmloraError` if the strength of a LoRA cannot be read."""
        for lora in self.loras:
            if lora.wrong:
                raise CmloraError(f"the picture's text, tag of LoRA {lora.name}: {lora.wrong}")

    def notes(self) -> list[str]:
        """What of the tags is not carried out, a line for each LoRA."""
        return [f"LoRA {lora.name}: {part}" for lora in self.loras for part in lora.left]

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
        _named(match[1], match[2].split(":")[1:], hashes.get(match[1], "").lower())
        for match in _LORA.finditer(whole)
    ]
    plain = re.sub(r"[ \t]{2,}", " ", _LORA.sub("", whole)).strip()
    return Infotext(plain, "\n".join(negative or []).strip(), values, tuple(loras))


def _named(name: str, arguments: list[str], digest: str) -> Named:
    """A LoRA with the arguments of its tag, of which the schedules' parser says what they mean."""
    kept: list[str] = []
    left: list[str] = []
    if len(arguments) > _MANY:
        return Named(name, hash=digest, wrong=f"{len(arguments)} arguments are too many")
    for argument in arguments:
        try:
            _track([*kept, argument])
        except ScheduleError as error:
            problem = str(error).partition(": ")[2].rpartition(" (at »")[0]
            problem = problem.removeprefix("schedule: ")
            if not _extra(argument, kept):
                return Named(name, hash=digest, wrong=problem)
            left.append(f"{argument.strip()!r} is left out: {problem}")
        else:
            kept.append(argument)
    track = _track(kept)
    points, found = track.curve.points, Named(name, 1.0, digest, left=tuple(left))
    alike = track.text == points[0][1] or (track.text is None and points[0][1] == 1)
    if track.curve.constant and alike and track.blocks is None:
        return replace(found, weight=points[0][1])
    if not track.curve.constant and track.text is None:
        left.append("its curve is for the denoiser; in the text encoders its strength is 1")
    track = replace(track, lora=name.strip() or "x")
    return replace(found, schedule=write_tag(track), left=tuple(left))


def _extra(argument: str, kept: Iterable[str]) -> bool:
    """Whether an argument is none of those that say how strong a LoRA is."""
    key = re.match(r"\s*([A-Za-z_]+)\s*=", argument)
    if key is not None:
        return key[1].lower() not in ("te", "unet")
    return sum("=" not in each for each in kept) >= 2


def _track(arguments: Iterable[str]) -> Track:
    tag, _ = read_tag(f"<lora:{':'.join(('x', *arguments))}>", 0)
    return tag.track


def _unquoted(value: str) -> str:
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            found = json.loads(value)
        except ValueError:
            return value
        return found if isinstance(found, str) else value
    return value
