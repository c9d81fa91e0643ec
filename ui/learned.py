"""Merges that are learnt on the model, as `cmlora merge` learns them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from cmlora import checks
from cmlora.errors import CmloraError
from cmlora.files import sha256
from cmlora.lora import LoRA
from cmlora.ui import libraries
from cmlora.ui.jobs import Clock, Event, Progress, Result, Ticket, stream
from cmlora.ui.jobs import Report as Tell
from cmlora.ui.order import check_strengths
from cmlora.ui.studio import Studio
from cmlora.ui.writing import Made, count_of, new_file, rank_of, read, sized, sources, write

NAMES = ("lorahub", "atlas", "concrete", "ziplora_trained")
"""The names in `cmlora.pipelines.learning.LEARNED`, known without loading it."""

OBJECTIVES = {
    "each LoRA's own answers": "distill",
    "the prompt, by CLIP": "clip_score",
    "pictures of mine": "denoise_mse",
}
"""What can be learnt towards, as the page says it."""

_PICTURES, _QUESTIONS, _STEPS = 32, 16, 2000
_SIDE = 4096  # pixels of a picture's longer side


@dataclass(frozen=True)
class Task:
    """Towards what a merge is learnt.

    Args:
        objective: a value of `OBJECTIVES`.
        prompt: of all LoRAs; each one's trigger word if empty.
        pictures: files that a visitor sent, for ``denoise_mse``.
        questions: denoising steps that are asked about, per LoRA or picture.
        control: learn on random LoRAs too.
    """

    objective: str = "distill"
    prompt: str = ""
    pictures: Sequence[Path] = ()
    questions: Any = 4
    control: bool = True


def missing(method: str, count: int, objective: str, pictures: int) -> str:
    """What a learned merge needs and has not been given; empty if it can begin.

    >>> missing("atlas", 2, "denoise_mse", 0)
    'add the pictures to learn from'
    """
    if count < 2:
        return "select two or more LoRAs"
    if objective == "clip_score" and method != "lorahub":
        return f"{method} follows gradients, and CLIP's score gives none; choose lorahub for it"
    if objective == "denoise_mse" and not pictures:
        return "add the pictures to learn from"
    return ""


def learn(
    studio: Studio,
    model: str,
    loras: Mapping[str, float],
    method: str,
    task: Task,
    ticket: Ticket,
    *,
    name: str = "",
    rank: Any = None,
    options: Mapping[str, str] | None = None,
) -> Iterator[Event]:
    """Learn a merge into a new LoRA among the server's.

    Args:
        studio: the server's.
        model: that it is learnt on.
        loras: strengths by name.
        method: one of `NAMES`.
        task: towards what.
        ticket: stops the work.
        name: of the result; made of the method and the names if empty.
        rank: the largest in the result; the method's choice if empty.
        options: of the method, as texts.

    Yields:
        `Progress`, and a `Result` with the `Made` file.

    Raises:
        CmloraError: if something is missing, unknown or beyond a limit.
    """
    loras = check_strengths(loras, studio.settings.limits)
    checks.choice("request", "method", method, NAMES)
    checks.choice("request", "objective", task.objective, tuple(OBJECTIVES.values()))
    problem = missing(method, len(loras), task.objective, len(task.pictures))
    if problem:
        raise CmloraError(problem)
    questions, most = count_of("questions", task.questions, _QUESTIONS), rank_of(rank)
    paths = sources(studio, model, loras)
    pictures = [_picture(path) for path in _few(task.pictures)]

    def work(tell: Tell) -> None:
        libraries.ready()
        from cmlora.adapters.merging.method import read_options
        from cmlora.pipelines.learning import LEARNED
        from cmlora.pipelines.learning import learn as fit

        rules = LEARNED[method].object
        values = read_options(method, rules, options or {})
        settings = {**rules.options(), **values}
        total = settings.get("steps", settings.get("budget", 1))
        if not 1 <= total <= _STEPS:
            raise CmloraError(f"{method} takes {total} steps; between 1 and {_STEPS} are made here")
        clock = Clock(total * (1 + task.control))
        tell(Progress(0, clock.total, "asking the model"))
        found = [read(path, own) for own, path in paths.items()]

        def stepped() -> None:
            ticket.check()
            clock.tick()
            tell(Progress(clock.done, clock.total, "learning", clock.left()))

        with studio.pipeline(model, {}) as pipe:
            weights = list(loras.values())
            objective = _objective(pipe, task, found, weights, pictures, questions, ticket)
            done = fit(
                method,
                found,
                weights,
                objective,
                rank=most,
                control=task.control,
                on_step=stepped,
                **values,
            )
        target = new_file(studio.uploads, name or f"{method}_{'_'.join(paths)}")
        recipe = json.loads(done.lora.metadata["cmlora.merge"])
        recipe |= {"sha256": [sha256(paths[own]) for own in recipe["loras"]], "model": model}
        recipe |= {"objective": task.objective, "losses": dict(done.losses)}
        metadata = {**done.lora.metadata, "cmlora.merge": json.dumps(recipe, sort_keys=True)}
        write(replace(done.lora, name=target.stem, metadata=metadata), target)
        losses = {
            f"loss of {_SAID[key]}": f"{value:.4g}"
            for key, value in sorted(done.losses.items(), key=lambda pair: pair[1])
        }
        report = done.report
        facts = {
            **losses,
            "distance from the exact sum": f"{report.error:.2%}",
            "rank": str(report.rank),
            **report.remarks,
            **({"notes": "; ".join(report.warnings)} if report.warnings else {}),
        }
        tell(Result(Made(target.stem, target, {**facts, **sized(target)})))

    return stream(work, ticket)


_SAID = {
    "learned": "what was learnt",
    "sum": "the LoRAs added up",
    "mean": "their mean",
    "base": "the model alone",
    "random": "the same method on random LoRAs",
}


def _objective(
    pipe: Any,
    task: Task,
    loras: Sequence[LoRA],
    weights: Sequence[float],
    pictures: Sequence[Image.Image],
    questions: int,
    ticket: Ticket,
) -> Any:
    from cmlora.pipelines.native import native_guidance
    from cmlora.pipelines.objectives import clip_score, denoise_mse, distill, scaled

    words = task.prompt or ", ".join(w for lora in loras for w in lora.triggers[:1])
    if task.objective == "clip_score":
        return clip_score(pipe, words, guidance_scale=native_guidance(pipe))
    if task.objective == "denoise_mse":
        return denoise_mse(pipe, list(pictures), words, steps=questions)
    return distill(
        pipe,
        [scaled(lora, weight) for lora, weight in zip(loras, weights, strict=True)],
        prompts={lora.name: [task.prompt] for lora in loras} if task.prompt else None,
        steps=questions,
        advance=ticket.check,
        guidance_scale=native_guidance(pipe),
    )


def _few(paths: Sequence[Path]) -> Sequence[Path]:
    if len(paths) > _PICTURES:
        raise CmloraError(f"{len(paths)} pictures; at most {_PICTURES} are learnt from")
    return paths


def _picture(path: Path) -> Image.Image:
    """A picture that a visitor sent; huge ones are refused before they are unpacked."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as file:
            if max(file.size) > _SIDE:
                raise CmloraError(f"{path.name} is larger than {_SIDE} pixels")
            return file.convert("RGB")
    except CmloraError:
        raise
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise CmloraError(f"{path.name} is no picture that can be read") from None
