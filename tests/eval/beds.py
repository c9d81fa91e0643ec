"""A tiny testbed on disk, and studies of it that other processes can carry out and be killed in."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmlora.cost import PassCost
from cmlora.eval.jobs import Job, jobs_of
from cmlora.eval.manifest import Manifest
from cmlora.eval.runner import Ears, Outcome, run
from cmlora.eval.shard import Shard
from cmlora.eval.studio import Studio
from cmlora.eval.study import Study
from cmlora.eval.testbeds import find_testbed
from cmlora.eval.variants import read
from tests import disk

WORDS = ("naive", "merge", "composite", "cmlora@nonuniform")
COST = PassCost(full=10**9, light=10**8)
"""Of a pass; made up, because counting takes longer than the pictures."""

CATEGORIES = {"ann": "character", "cat": "character", "hat": "clothing", "ink": "style"}


def save_bed(folder: Path, **changes: Any) -> Path:
    """A testbed of four random LoRAs for the tiny model, with everything in one folder.

    Args:
        folder: to be made.
        changes: to the manifest.
    """
    folder.mkdir(parents=True)
    disk.save_model(folder / "model")
    for name in CATEGORIES:
        disk.save_lora(folder, name)
    table: dict[str, Any] = {
        "cmlora_testbed": 1,
        "name": "tiny",
        "model": "model",
        "loras": [
            {"id": name, "category": category, "triggers": [name]}
            for name, category in CATEGORIES.items()
        ],
        "required": ["character"],
        "steps": 4,
        "guidance_scale": 4.0,
        "width": 32,
        "height": 32,
        "seeds": [5],
    }
    (folder / "testbed.json").write_text(json.dumps(table | changes))
    return folder


def manifest(**changes: Any) -> Manifest:
    """The same testbed without files."""
    table = {
        "cmlora_testbed": 1,
        "name": "tiny",
        "model": "model",
        "loras": [
            {"id": name, "category": category, "triggers": [f"the {name}", "a word"]}
            for name, category in CATEGORIES.items()
        ],
        "required": ["character"],
    }
    return Manifest.from_dict(table | changes)


def open_studio(bed: Path | str, **options: Any) -> Studio:
    """The tiny testbed, or for ``emoji`` the embedded one with short runs."""
    found = find_testbed(bed)
    if found.model == "emoji":
        return Studio(replace(found, steps=2, seeds=(5,)), **options)
    return Studio(found, folder=bed, **options)


def jobs_in(
    studio: Studio, words: tuple[str, ...] = WORDS, sizes: tuple[int, ...] = (2,)
) -> list[Job]:
    sets = [ids for size in sizes for ids in studio.manifest.sample(size, 4)]
    return jobs_of(studio, sets, read(words), studio.manifest.seeds)


def work(
    bed: Path | str,
    out: Path,
    words: tuple[str, ...] = WORDS,
    shard: tuple[int, int] = (0, 1),
    ears: Ears | None = None,
    studio: Studio | None = None,
) -> Outcome:
    """One process's part of a study of the tiny testbed; may be called in a process of its own.

    Args:
        bed: the testbed's folder, or ``emoji``.
        out: of the study.
        words: the methods.
        shard: index and count.
        ears: who is told.
        studio: of the testbed, if it is open.
    """
    import torch

    torch.set_num_threads(1)
    studio, study = studio or open_studio(bed), Study(out)
    jobs = jobs_in(studio, words)
    study.begin(studio, {}, COST)
    return run(study, studio, jobs, shard=Shard(*shard), cost=COST, ears=ears)


def pictures(out: Path) -> dict[str, bytes]:
    """Every picture of a run by the key of its job; all recorded and readable."""
    from cmlora.recipe import from_png

    study, found = Study(out), {}
    for key, record in study.records().items():
        path = out / record.image
        from_png(path)
        found[key] = path.read_bytes()
    return found
