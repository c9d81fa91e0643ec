"""`cmlora evaluate run` and `init`: make a study's pictures, and testbeds of one's own."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Column, Table

from cmlora.cli import arguments, options
from cmlora.cli.console import emit, err, out, progress, quiet_libraries, status
from cmlora.errors import CmloraError

Testbed = Annotated[
    str, typer.Argument(help="emoji, composlora-anime, composlora-reality, a file, or a folder.")
]
Run = Annotated[Path, typer.Argument(help="Folder of a run.")]
ShardText = Annotated[
    str, typer.Option(help="INDEX/COUNT: this part of the work, if you start several yourself.")
]
FAILED = 1


def run(
    testbed: Testbed,
    methods: options.Methods = "",
    n: Annotated[str, typer.Option("--n", help="LoRAs per set, such as 2,3 or 2-5.")] = "2-5",
    sets: Annotated[
        int | None, typer.Option(help="At most so many sets per N, chosen by a hash.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Such as 0-3; the testbed's if empty.")] = "",
    destination: Annotated[
        Path, typer.Option("--out", help="Folder of the run; an existing one is continued.")
    ] = Path("run"),
    model: Annotated[str, typer.Option(help="Replaces the testbed's model.")] = "",
    lora_dir: options.LoRAFolder = None,
    steps: Annotated[int | None, typer.Option(help="Replaces the testbed's steps.")] = None,
    option: options.Settings = None,
    execution: options.Execution = "sequential",
    limit: Annotated[int | None, typer.Option(help="Only the first so many jobs.")] = None,
    attempts: Annotated[int, typer.Option(help="How often a failing job is tried.")] = 2,
    keep: Annotated[int, typer.Option(help="How many LoRAs stay loaded.")] = 32,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and how long it takes.")
    ] = False,
    shard: ShardText = "",
    device: options.Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Make every method's pictures of a testbed; go on where an earlier start was interrupted.

    Example: [bold]cmlora evaluate run emoji --methods merge,cmlora@nonuniform --out run[/bold]

    On several devices: [bold]accelerate launch -m cmlora.eval run emoji --out run[/bold]
    """
    from dataclasses import replace

    from cmlora.eval.jobs import jobs_of
    from cmlora.eval.runner import Ears, pending
    from cmlora.eval.runner import run as carry_out
    from cmlora.eval.shard import device_of, launched, read_shard
    from cmlora.eval.studio import Studio
    from cmlora.eval.study import Study
    from cmlora.eval.testbeds import find_testbed

    for name, number in (("sets", sets), ("steps", steps), ("limit", limit), ("keep", keep)):
        if number is not None and number < 1:
            raise CmloraError(f"--{name} {number}: at least 1")
    if attempts < 1:
        raise CmloraError(f"--attempts {attempts}: at least 1")
    sizes = arguments.sizes(n)
    part = read_shard(shard) if shard else launched()
    manifest = find_testbed(testbed)
    if steps is not None:
        manifest = replace(manifest, steps=steps)
    variants = _variants(methods)
    chosen = [ids for size in sizes for ids in manifest.sample(size, sets)]
    if not chosen:
        raise CmloraError(f"testbed {manifest.name} has no sets of {n} LoRAs")
    given = arguments.pairs("--option", option or ())
    quiet_libraries()
    place = device_of(part, device)
    study = Study(destination)
    with status("loading"):
        studio = Studio(
            manifest,
            folder=lora_dir,
            model=model or None,
            device=place,
            dtype=dtype,
            room=keep,
            execution=execution,
        )
        columns = arguments.seeds(seeds) if seeds else manifest.seeds
        jobs = jobs_of(studio, chosen, variants, columns, given)[:limit]
        cost = studio.cost(jobs[0].recipe)
    if dry_run:
        _say_plan(study, studio, jobs, cost, as_json)
        return
    guide = _guide(studio.manifest, jobs, place)
    study.begin(studio, given, cost)
    todo = pending(study, part.share_of_sets(jobs))
    weights = _weights(studio, todo, cost)
    with progress(f"pictures, part {part.index + 1} of {part.count}", len(todo)) as bar:
        task = bar.task_ids[0]
        bar.update(task, total=sum(weights.values()) or 1)
        ears = Ears(done=lambda job, record: bar.advance(task, weights.get(job.key, 0)))
        outcome = carry_out(
            study,
            studio,
            jobs,
            shard=part,
            cost=cost,
            score=lambda: guide,
            attempts=attempts,
            ears=ears,
        )
    if as_json:
        emit({"out": str(destination), "jobs": len(jobs), **vars(outcome)})
    else:
        err.print(
            f"{outcome.made} pictures made, {outcome.kept} were there, "
            f"{len(outcome.failed)} failed: {destination}",
            soft_wrap=True,
        )
        for name, reason in list(outcome.failed.items())[:10]:
            err.print(f"  {name}: {reason}", markup=False, soft_wrap=True)
    if outcome.failed:
        raise typer.Exit(FAILED)


def init(
    folder: Annotated[Path, typer.Argument(help="Of LoRA files.")],
    model: Annotated[str, typer.Option(help="The base model they are for.")],
    as_json: options.AsJson = False,
) -> None:
    """Make a testbed of a folder of LoRAs: a testbed.json in it, to be edited.

    Example: [bold]cmlora evaluate init my-loras --model owner/model[/bold]
    """
    from cmlora.eval.testbeds import find_testbed
    from cmlora.eval.testbeds import init as make

    path = make(folder, model)
    bed = find_testbed(folder)
    counts = {size: len(bed.combinations(size)) for size in range(2, 6)}
    if as_json:
        emit({"file": str(path), "loras": len(bed.loras), "sets": counts})
        return
    out.print(f"{path}", soft_wrap=True)
    listed = ", ".join(f"{count} of {size}" for size, count in counts.items())
    err.print(f"{len(bed.loras)} LoRAs; sets: {listed}. Edit categories and triggers, then")
    err.print(f"cmlora evaluate run {folder} --lora-dir {folder} --out run", soft_wrap=True)


def _variants(methods: str) -> Any:
    from cmlora.eval.variants import USUAL, read

    return read(arguments.variants(methods) or USUAL)


def _guide(manifest: Any, jobs: Any, device: str | None) -> Any:
    """What LoraHub's search climbs, made before the work so that it fails before the work."""
    from cmlora.eval.scoring import guide
    from cmlora.pipelines.models import EMBEDDED

    if manifest.model == EMBEDDED or not any(job.searched for job in jobs):
        return None
    return guide(manifest, device)


def _weights(studio: Any, jobs: Any, cost: Any) -> dict[str, float]:
    """What each job counts in the progress bar: its planned multiply-accumulates."""
    return {job.key: _macs(studio, job, cost) for job in jobs}


def _macs(studio: Any, job: Any, cost: Any) -> float:
    from cmlora.cost import PassCost
    from cmlora.eval.jobs import planned_cost

    return float(planned_cost(studio, job, cost or PassCost(1, 1)).macs)


def _say_plan(study: Any, studio: Any, jobs: Any, cost: Any, as_json: bool) -> None:
    """The dry run: jobs, what is done, multiply-accumulates, and the time it will take here."""
    from cmlora.eval.runner import estimate, pending

    todo = {job.key for job in pending(study, jobs)} if study.file.exists() else None
    with status("timing a pass"):
        seconds = estimate(studio, jobs[0])
    unit = cost.full if cost else 1
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for job in jobs:
        key = (job.variant.label, len(job.ids))
        row = rows.setdefault(
            key, {"method": key[0], "n": key[1], "jobs": 0, "done": 0, "macs": 0.0, "seconds": 0.0}
        )
        row["jobs"] += 1
        if todo is not None and job.key not in todo:
            row["done"] += 1
            continue
        macs = _macs(studio, job, cost)
        row["macs"] += macs if cost else 0
        row["seconds"] += macs / unit * seconds
    total = sum(row["seconds"] for row in rows.values())
    searched = sum(1 for job in jobs if job.searched and (todo is None or job.key in todo))
    if as_json:
        emit(
            {
                "jobs": len(jobs),
                "done": sum(row["done"] for row in rows.values()),
                "macs": sum(row["macs"] for row in rows.values()) if cost else None,
                "seconds": total,
                "searches": searched,
                "rows": list(rows.values()),
            }
        )
        return
    columns = ("N", "jobs", "done", "TMACs", "hours")
    table = Table(
        Column("method", no_wrap=True), *(Column(c, justify="right") for c in columns), box=SIMPLE
    )
    for row in rows.values():
        counted = f"{row['macs'] / 1e12:.4g}" if cost else "-"
        hours = f"{row['seconds'] / 3600:.3g}"
        numbers = map(str, (row["n"], row["jobs"], row["done"]))
        table.add_row(row["method"], *numbers, counted, hours)
    out.print(table)
    out.print(f"{len(jobs)} jobs, about {total / 3600:.3g} h on one device like this one")
    if searched:
        out.print(f"and {searched} searches for coefficients, which are not in these numbers")
