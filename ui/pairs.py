"""Whether two LoRAs can become one, as `cmlora analyze align` finds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cmlora.adapters.analysis.merging import Barrier, Mergeability, barrier, mergeability
from cmlora.adapters.analysis.mismatch import check_families
from cmlora.errors import CmloraError
from cmlora.lora import stack
from cmlora.ui import libraries
from cmlora.ui.jobs import Clock, Event, Progress, Result, Ticket, stream
from cmlora.ui.jobs import Report as Tell
from cmlora.ui.studio import Studio
from cmlora.ui.writing import read, sources

_POINTS = 11


@dataclass(frozen=True)
class Alignment:
    """How alike two LoRAs are, and what lies between them.

    Args:
        names: of the two.
        likeness: from their files.
        hill: the loss on the way from one to the other; ``None`` if it was not measured.
    """

    names: tuple[str, str]
    likeness: Mergeability
    hill: Barrier | None = None


def missing(count: int) -> str:
    """What a comparison still needs; empty if it can begin.

    >>> missing(3)
    'select exactly two LoRAs; 3 are selected'
    """
    return "" if count == 2 else f"select exactly two LoRAs; {count} are selected"


def align(
    studio: Studio,
    model: str,
    loras: Mapping[str, float],
    ticket: Ticket,
    *,
    on_model: bool = False,
) -> Iterator[Event]:
    """Compare two LoRAs.

    Args:
        studio: the server's.
        model: whose LoRAs they are.
        loras: two LoRAs by name; strengths have no part in it.
        ticket: stops the work.
        on_model: measure the loss on the way between them on the model too.

    Yields:
        `Progress`, and a `Result` with the `Alignment`.

    Raises:
        CmloraError: unless two are selected that are made for one base.
    """
    if missing(len(loras)):
        raise CmloraError(missing(len(loras)))
    paths = sources(studio, model, loras)

    def work(tell: Tell) -> None:
        clock = Clock(1 + on_model * _POINTS)
        tell(Progress(0, clock.total, "comparing"))
        one, other = (read(path, own) for own, path in paths.items())
        check_families([one, other])
        likeness, hill = mergeability(one, other), None
        clock.tick()
        if on_model:
            libraries.ready()
            from cmlora.pipelines.native import native_guidance
            from cmlora.pipelines.objectives import distill

            tell(Progress(clock.done, clock.total, "asking the model"))
            with studio.pipeline(model, {}) as pipe:
                scale = native_guidance(pipe)
                asked = distill(pipe, [one, other], advance=ticket.check, guidance_scale=scale)

                def loss(t: float) -> float:
                    ticket.check()
                    clock.tick()
                    tell(Progress(clock.done, clock.total, "on the way", clock.left()))
                    return asked.value(stack([(one, 1 - t), (other, t)], "between"))

                hill = barrier(loss, _POINTS)
        tell(Result(Alignment((one.name, other.name), likeness, hill)))

    return stream(work, ticket)
