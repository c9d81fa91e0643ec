"""The server's calibration data: what a model's layers see, measured once for everybody."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from cmlora.adapters.analysis.saturation import Saturation, saturation
from cmlora.adapters.calibration import load, save
from cmlora.errors import CmloraError
from cmlora.ui import libraries
from cmlora.ui.jobs import Clock, Event, Progress, Result, Ticket, stream
from cmlora.ui.jobs import Report as Tell
from cmlora.ui.order import check_strengths
from cmlora.ui.shelf import Shelf, is_safetensors
from cmlora.ui.studio import Studio
from cmlora.ui.writing import Made, count_of, new_file, plainly, read, sized, sources

STEPS = 4
_MOST = 64  # steps of a run


def shelf(studio: Studio) -> Shelf:
    """What has been measured, by name."""
    return Shelf("calibration", (studio.settings.out / "calibrations",), is_safetensors)


def calibrate(
    studio: Studio,
    model: str,
    loras: Mapping[str, float],
    ticket: Ticket,
    *,
    steps: Any = STEPS,
    prompt: str = "",
) -> Iterator[Event]:
    """Measure what the layers of a model see, alone and with each LoRA, and keep it.

    Args:
        studio: the server's.
        model: its name.
        loras: the LoRAs by name; each is measured at its own strength of 1.
        ticket: stops the work.
        steps: denoising steps of each run.
        prompt: for all runs; each LoRA's trigger word if empty.

    Yields:
        `Progress`, and a `Result` with the `Made` file.

    Raises:
        CmloraError: if no LoRA is selected, or one of them names no trigger word without a prompt.
    """
    loras = check_strengths(loras, studio.settings.limits)
    if not loras:
        raise CmloraError("no LoRA is selected; select those that are to be measured")
    count = count_of("steps", steps, _MOST)
    paths = sources(studio, model, loras)

    def work(tell: Tell) -> None:
        libraries.ready()
        from cmlora.pipelines.calibrate import calibrate as measure
        from cmlora.pipelines.native import native_guidance

        clock = Clock(len(loras) + 1 if prompt else 2 * len(loras))
        tell(Progress(0, clock.total, "loading"))

        def advance() -> None:
            ticket.check()
            clock.tick()
            tell(Progress(clock.done, clock.total, "measuring", clock.left()))

        with studio.pipeline(model, dict.fromkeys(loras, 1.0)) as pipe:
            found = measure(
                pipe,
                [prompt] if prompt else (),
                steps=count,
                advance=advance,
                guidance_scale=native_guidance(pipe),
            )
        target = new_file(studio.settings.out / "calibrations", "_".join([model, *paths]))
        save(found, target)
        layers = max(map(len, found.seen.values()))
        facts = {"LoRAs": ", ".join(paths), "layers": str(layers), **sized(target)}
        tell(Result(Made(target.stem, target, facts)))

    return stream(work, ticket)


def uncovered(studio: Studio, model: str, loras: Mapping[str, float], calib: str) -> list[str]:
    """The LoRAs that a calibration knows nothing of.

    Raises:
        CmloraError: if there is no such calibration or LoRA.
    """
    path = shelf(studio).find(calib)
    known = _hashes(path, path.stat().st_mtime_ns)
    return [name for name in loras if studio.hash_of(studio.lora_path(name, model)) not in known]


def grams(
    studio: Studio, model: str, loras: Mapping[str, float], calib: str
) -> dict[str, Mapping[str, Any]]:
    """Second moments of the layers' inputs for each LoRA, as merging methods take them.

    Raises:
        CmloraError: if the calibration is damaged or knows nothing of a LoRA.
    """
    path = shelf(studio).find(calib)
    known = plainly(path, lambda: load(path))
    return {
        own: known.grams(known.name_of(own, studio.hash_of(file)))
        for own, file in sources(studio, model, loras).items()
    }


def safe_strengths(
    studio: Studio, model: str, loras: Mapping[str, float], calib: str
) -> tuple[Saturation, ...]:
    """How strong LoRAs may be before layers leave the range that the model knows.

    Raises:
        CmloraError: if no LoRA is selected, or the calibration knows nothing of one.
    """
    if not loras:
        raise CmloraError("no LoRA is selected; select those that the calibration is about")
    left = uncovered(studio, model, loras, calib)
    if left:
        raise CmloraError(f"{calib} knows nothing of {left[0]}; measure the selection again")
    path = shelf(studio).find(calib)
    known = plainly(path, lambda: load(path))
    found = [read(file, own) for own, file in sources(studio, model, loras).items()]
    return tuple(saturation(known, found, list(loras.values())))


@lru_cache(64)
def _hashes(path: Path, changed: int) -> frozenset[str]:
    return frozenset(plainly(path, lambda: load(path)).hashes.values())
