"""Carries jobs out one by one so that nothing is lost or done twice, however it is interrupted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from cmlora.cost import PassCost
from cmlora.errors import CmloraError
from cmlora.eval.jobs import Job
from cmlora.eval.records import Journal
from cmlora.eval.shard import Shard
from cmlora.eval.studio import Studio
from cmlora.eval.study import Record, Study, digest_of
from cmlora.pipelines.coefficients import Score, coefficients
from cmlora.recipe import save_png

PATIENCE = 20
"""After so many failures in a row the rest would fail as well."""


@dataclass
class Outcome:
    """What a process did.

    Args:
        made: jobs finished now.
        kept: jobs that had been finished before.
        failed: reasons by job name, for jobs that failed at every attempt.
    """

    made: int = 0
    kept: int = 0
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ears:
    """Who is told what happens; for progress bars.

    Args:
        step: after every denoising step.
        done: after every job, with its record, or ``None`` if it failed.
    """

    step: Callable[[], None] = lambda: None
    done: Callable[[Job, Record | None], None] = lambda job, record: None


def pending(study: Study, jobs: Sequence[Job]) -> list[Job]:
    """Jobs without a record, or whose picture is gone."""
    records = study.records()
    return [
        job
        for job in jobs
        if job.key not in records or not (study.folder / records[job.key].image).is_file()
    ]


def run(
    study: Study,
    studio: Studio,
    jobs: Sequence[Job],
    *,
    shard: Shard | None = None,
    cost: PassCost | None = None,
    score: Callable[[], Score | None] = lambda: None,
    attempts: int = 2,
    ears: Ears | None = None,
) -> Outcome:
    """Do this process's part of some jobs.

    The sets of the jobs are dealt out to the shards, so a set's text embeddings and LoRAs are
    needed in one process only. A picture appears under its name when it is complete, and its line
    in the records after that: a line means that the file is whole.

    Args:
        study: where results go; `Study.begin` was called.
        studio: makes the pictures.
        jobs: all of them, the same in every process.
        shard: this process; alone if ``None``.
        cost: of a pass.
        score: makes what guides the search for coefficients, when it is needed.
        attempts: how often a failing job is tried.
        ears: who is told.

    Raises:
        CmloraError: if another process has the same part, nothing can be written, or very many
            jobs fail one after another.
    """
    mine, listening = shard or Shard(), ears or Ears()
    outcome = Outcome()
    with Journal(study.folder / "records" / f"part-{mine.index:05}.jsonl") as journal:
        assigned = mine.share_of_sets(jobs)
        queue = pending(study, assigned)
        outcome.kept = len(assigned) - len(queue)
        _sweep(study, queue)
        for attempt in range(1, attempts + 1):
            failed: list[Job] = []
            in_a_row = 0
            for job in queue:
                try:
                    record = make(study, studio, job, cost=cost, score=score, step=listening.step)
                except Exception as error:  # whatever a model does wrong must not end the study
                    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                    journal.append({"key": job.key, "error": reason})
                    outcome.failed[job.name] = reason
                    failed.append(job)
                    in_a_row += 1
                    if in_a_row == PATIENCE:
                        raise CmloraError(
                            f"{PATIENCE} jobs in a row failed, the last one ({job.name}) with "
                            f"{reason}; what was finished is kept"
                        ) from error
                    if attempt == attempts:
                        listening.done(job, None)
                    continue
                journal.append(_row(record))
                outcome.failed.pop(job.name, None)
                outcome.made += 1
                in_a_row = 0
                listening.done(job, record)
            queue = failed
    return outcome


def make(
    study: Study,
    studio: Studio,
    job: Job,
    *,
    cost: PassCost | None = None,
    score: Callable[[], Score | None] = lambda: None,
    step: Callable[[], None] = lambda: None,
) -> Record:
    """Make a job's picture and put it in its place; the record is the caller's to keep.

    Args:
        study: where it goes.
        studio: makes it.
        job: which.
        cost: of a pass.
        score: see `run`.
        step: called after every denoising step.
    """
    recipe = job.recipe
    if job.searched is not None:
        found = _coefficients(study, studio, job, score())
        recipe = replace(recipe, options={**recipe.options, job.searched: list(found)})
    made = studio.render(job.ids, studio.settled(job.ids, recipe), on_step=step)
    path = study.folder / study.image_name(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(made.image, path, made.recipe)
    report = made.report
    return Record(
        key=job.key,
        ids=job.ids,
        method=job.variant.method,
        cache=job.variant.cache,
        seed=job.seed,
        image=study.image_name(job),
        sha256=digest_of(path),
        seconds=report.seconds,
        full=math.fsum(report.full.values()),
        light=math.fsum(report.light.values()),
        macs=None if cost is None else cost.of(report.full, report.light),
        options=made.recipe.options,
        variant=job.variant.label,
    )


def estimate(studio: Studio, job: Job, repeats: int = 2) -> float:
    """Seconds of one full pass here and now: a short run of the base model, timed.

    Args:
        studio: the model.
        job: whose size and guidance are used.
        repeats: steps that are timed, after one that is not.
    """
    times: list[float] = []
    base = replace(job.recipe, loras=(), order=(), method="naive", options={}, cache="none")
    recipe = replace(base, steps=repeats + 1)
    studio.render((), recipe, on_step=lambda: times.append(time.perf_counter()))
    return min(after - before for before, after in pairwise(times))


def _coefficients(study: Study, studio: Studio, job: Job, score: Score | None) -> tuple[float, ...]:
    """What LoraHub's search finds for a set; kept in the run's folder."""
    studio.load(job.ids)
    recipe = job.recipe
    return coefficients(
        studio.pipe.ensemble,
        recipe.prompt,
        {lora.name: lora.weight for lora in recipe.loras},
        score=score,
        folder=study.folder / "lorahub",
        guidance_scale=recipe.guidance_scale,
        width=recipe.width,
        height=recipe.height,
        execution=recipe.execution,
    )


def _row(record: Record) -> Mapping[str, Any]:
    return {**vars(record), "ids": list(record.ids), "options": dict(record.options)}


def _sweep(study: Study, queue: Sequence[Job]) -> None:
    """Remove what an interrupted process left of pictures that are to be made now."""
    by_folder: dict[Path, set[str]] = {}
    for job in queue:
        path = study.folder / study.image_name(job)
        by_folder.setdefault(path.parent, set()).add(path.name)
    for folder, names in by_folder.items():
        for file in folder.glob(".*.png.*") if folder.is_dir() else ():
            if file.name[1:].rpartition(".")[0] in names:
                file.unlink(missing_ok=True)
