"""All LoRAs of a model compared with each other, as `cmlora analyze library` does it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cmlora.adapters.analysis.library import Library, survey
from cmlora.adapters.analysis.mismatch import UNKNOWN, families
from cmlora.errors import CmloraError
from cmlora.ui.jobs import Clock, Event, Progress, Result, Ticket, stream
from cmlora.ui.jobs import Report as Tell
from cmlora.ui.studio import Studio
from cmlora.ui.talk import sentence
from cmlora.ui.writing import read

MOST = 200
"""LoRAs that are compared; all of them are in memory together."""


@dataclass(frozen=True)
class Survey:
    """What a shelf holds.

    Args:
        family: of the LoRAs that were compared.
        library: how they are to each other.
        left_out: why, by name, for those that were not compared.
    """

    family: str
    library: Library
    left_out: Mapping[str, str]


def look_over(studio: Studio, model: str, ticket: Ticket) -> Iterator[Event]:
    """Compare the LoRAs that a model may have.

    Files that cannot be read, and those of another family than most, are left out and named.

    Args:
        studio: the server's.
        model: whose LoRAs they are.
        ticket: stops the work.

    Yields:
        `Progress`, and a `Result` with the `Survey`.

    Raises:
        CmloraError: if there are fewer than two, or too many.
    """
    paths = studio.lora_paths(model)
    if not 2 <= len(paths) <= MOST:
        raise CmloraError(f"there are {len(paths)} LoRAs; 2 to {MOST} can be compared")

    def work(tell: Tell) -> None:
        clock = Clock(len(paths) + 1)
        loras, left_out = [], {}
        for name, path in paths.items():
            ticket.check()
            tell(Progress(clock.done, clock.total, f"reading {name}", clock.left()))
            try:
                loras.append(read(path, name))
            except CmloraError as error:
                left_out[name] = sentence(error)
            clock.tick()
        kinds = families(loras)
        known = Counter(kind for kind in kinds.values() if kind != UNKNOWN)
        family = known.most_common(1)[0][0] if known else UNKNOWN
        for name, kind in kinds.items():
            if kind not in (family, UNKNOWN):
                left_out[name] = f"it is for {kind}"
        same = [lora for lora in loras if lora.name not in left_out]
        tell(Progress(clock.done, clock.total, "comparing"))
        tell(Result(Survey(family, survey(same), left_out)))

    return stream(work, ticket)
