"""What `cmlora merge` does for methods that learn: open the model, learn, compare, write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from cmlora.cli.console import emit, out, progress, quiet_libraries, status
from cmlora.cli.pictures import draw_merge
from cmlora.cli.told import tell
from cmlora.errors import CmloraError

LEARNERS = ("lorahub", "atlas", "concrete", "ziplora_trained")
"""The names in `cmlora.pipelines.learning.LEARNED`, known without loading it."""
OBJECTIVES = ("distill", "denoise_mse", "clip_score", "clip_entropy")
_PICTURES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class Task:
    """Where and towards what a merge is learnt.

    Args:
        model: see `cmlora.pipelines.models.locate`.
        objective: one of `OBJECTIVES`.
        prompts: of all LoRAs; each one's trigger word if empty.
        refs: a folder of pictures, for ``denoise_mse``.
        control: learn on random LoRAs too.
        questions: denoising steps that are asked about, per LoRA or picture.
    """

    model: str
    objective: str
    prompts: Sequence[str]
    refs: Path | None
    control: bool
    questions: int = 4


def learned(
    task: Task,
    method: str,
    sources: Mapping[str, Path],
    weights: Sequence[float],
    output: Path,
    *,
    name: str,
    rank: int | None,
    seed: int,
    settings: Mapping[str, Any],
    plot: Path | None,
    as_json: bool,
) -> None:
    """Learn a merge, write it, and say what it is worth."""
    import json
    from dataclasses import asdict, replace

    from cmlora.adapters.merging.method import read_options as checked
    from cmlora.adapters.objective import Objective
    from cmlora.files import read, sha256, write
    from cmlora.pipelines.certainty import clip_entropy
    from cmlora.pipelines.learning import LEARNED, learn
    from cmlora.pipelines.native import native_guidance
    from cmlora.pipelines.objectives import clip_score, denoise_mse, distill, scaled
    from cmlora.pipelines.render import assemble

    pictures = _pictures(task)
    values = checked(method, LEARNED[method].object, settings)
    quiet_libraries()
    with status("loading"):
        pipe = assemble(task.model, [])
        loras = [replace(read(path), name=own) for own, path in sources.items()]
    objective: Objective
    with status("asking the model"):
        if task.objective in ("distill", "clip_entropy"):
            if task.prompts and task.objective == "clip_entropy":
                raise CmloraError("clip_entropy tells the LoRAs' own prompts apart: no --prompt")
            ready = [scaled(x, w) for x, w in zip(loras, weights, strict=True)]
            prompts = {own: list(task.prompts) for own in sources} if task.prompts else None
            asking = clip_entropy if task.objective == "clip_entropy" else distill
            objective = asking(
                pipe,
                ready,
                prompts=prompts,
                steps=task.questions,
                seed=seed,
                guidance_scale=native_guidance(pipe),
            )
        elif task.objective == "clip_score":
            text = ", ".join(task.prompts or [w for x in loras for w in x.triggers[:1]])
            objective = clip_score(pipe, text, guidance_scale=native_guidance(pipe))
        else:
            text = ", ".join(task.prompts or [w for x in loras for w in x.triggers[:1]])
            objective = denoise_mse(pipe, pictures, text, steps=task.questions, seed=seed)
    options = {**LEARNED[method].object.options(), **values}
    total = options.get("steps", options.get("budget", 1)) * (1 + task.control)
    with progress("learning", total) as bar:
        done = learn(
            method,
            loras,
            weights,
            objective,
            name=name,
            rank=rank,
            seed=seed,
            control=task.control,
            on_step=lambda: bar.advance(bar.task_ids[0]),
            **values,
        )
    recipe = json.loads(done.lora.metadata["cmlora.merge"])
    recipe |= {"sha256": [sha256(sources[own]) for own in recipe["loras"]], "model": task.model}
    recipe |= {"objective": task.objective, "losses": dict(done.losses)}
    metadata = {**done.lora.metadata, "cmlora.merge": json.dumps(recipe, sort_keys=True)}
    write(replace(done.lora, metadata=metadata), output)
    report = done.report
    draw_merge(plot, f"{method} of {', '.join(sources)}", done.lora, loras, report.errors)
    if as_json:
        facts = {"file": str(output), "sha256": sha256(output), "losses": dict(done.losses)}
        emit({**facts, **asdict(report), "strengths": _plain(done.fitted.strengths)})
        return
    words = {
        "learned": "what was learnt",
        "sum": "the LoRAs added up",
        "mean": "their mean",
        "base": "the model alone",
        "random": "the same method on random LoRAs",
    }
    table = Table("of", Column("loss", justify="right"), title=f"{method}, {task.objective}")
    for key, value in sorted(done.losses.items(), key=lambda pair: pair[1]):
        table.add_row(words[key], f"{value:.4g}")
    out.print(table)
    tell(report, output)


def _pictures(task: Task) -> list[Any]:
    if task.objective not in OBJECTIVES:
        raise CmloraError(f"--objective {task.objective}: expected {', '.join(OBJECTIVES)}")
    if (task.refs is None) == (task.objective == "denoise_mse"):
        raise CmloraError("--refs FOLDER and --objective denoise_mse belong together")
    if task.questions < 1:
        raise CmloraError(f"--questions {task.questions}: at least 1")
    if task.refs is None:
        return []
    if not task.refs.is_dir():
        raise CmloraError(f"--refs {task.refs} is not a folder")
    from PIL import Image

    paths = sorted(p for p in task.refs.iterdir() if p.suffix.lower() in _PICTURES)
    if not paths:
        raise CmloraError(f"--refs {task.refs} holds no pictures ({', '.join(sorted(_PICTURES))})")
    try:
        return [Image.open(path).convert("RGB") for path in paths]
    except OSError as error:
        raise CmloraError(f"--refs {task.refs}: {error}") from None


def _plain(strengths: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {name: dict(own) for name, own in strengths.items()}
