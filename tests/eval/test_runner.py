"""The runner on a tiny testbed: nothing is lost, done twice, or different."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cmlora.errors import CmloraError
from cmlora.eval import runner
from cmlora.eval.jobs import job_key, jobs_of, planned_cost
from cmlora.eval.records import Journal, rows
from cmlora.eval.runner import Ears, estimate, pending, run
from cmlora.eval.shard import Shard, launched, read_shard
from cmlora.eval.study import Study
from cmlora.eval.variants import read
from cmlora.recipe import from_png
from tests.eval import beds


def test_every_job_is_there_once_with_its_facts(bed: Path, whole: Path) -> None:
    study = Study(whole)
    records = list(study.records().values())
    assert len(rows((whole / "records").glob("*.jsonl"))) == len(records) == 4 * len(beds.WORDS)
    assert {r.label for r in records} == set(beds.WORDS)
    for record in records:
        recipe = from_png(whole / record.image)
        assert recipe.method == record.method
        assert recipe.prompt == study.manifest.prompt_of(record.ids)
        assert [lora.name.split("_", 1)[1] for lora in recipe.loras] == list(record.ids)
        assert record.full + record.light == {"naive": 4, "merge": 4}.get(record.method, 8)
        assert record.macs is not None
        assert (record.light > 0) == (record.cache == "nonuniform")
    assert study.manifest.name == "tiny"


def test_planned_costs_are_the_ones_found(bed: Path, whole: Path) -> None:
    studio = beds.open_studio(bed)
    records = Study(whole).records()
    jobs = beds.jobs_in(studio)
    for job in jobs:
        record = records[job.key]
        assert planned_cost(studio, job, beds.COST).macs == record.macs
        assert record.macs == record.full * 10**9 + record.light * 10**8


def test_methods_of_a_set_share_their_noise_and_sets_do_not(bed: Path) -> None:
    jobs = beds.jobs_in(beds.open_studio(bed))
    seeds = {job.ids: {j.recipe.image_seed() for j in jobs if j.ids == job.ids} for job in jobs}
    assert all(len(found) == 1 for found in seeds.values())
    assert len({seed for found in seeds.values() for seed in found}) == len(seeds)


def test_a_job_is_its_content(bed: Path, tmp_path: Path) -> None:
    """Neither the place of the files nor what else is asked for is part of the key."""
    here, moved = beds.open_studio(bed), beds.save_bed(tmp_path / "moved")
    there = beds.open_studio(moved)
    jobs = {job.key for job in beds.jobs_in(here)}
    assert {job.key for job in beds.jobs_in(there, (*beds.WORDS, "switch"))} > jobs
    job = beds.jobs_in(here)[0]
    changes: list[dict[str, Any]] = [
        {"seed": 6},
        {"prompt": "other"},
        {"method": "merge"},
        {"steps": 5},
        {"loras": ()},
        {"negative_prompt": "grey"},
        {"guidance_scale": 2.0},
        {"versions": {"cmlora": "0"}},
    ]
    keys = {job_key(replace(job.recipe, **change), here.model_hash) for change in changes}
    assert len(keys | {job.key}) == len(changes) + 1
    assert job_key(job.recipe, "other model") != job.key


def test_pictures_do_not_depend_on_what_was_made_before(bed: Path, whole: Path) -> None:
    """In another order, with room for two LoRAs only, and one method alone."""
    expected = beds.pictures(whole)
    studio = beds.open_studio(bed, room=2)
    out = whole.parent / "other_order"
    study = Study(out)
    study.begin(studio, {}, None)
    jobs = beds.jobs_in(studio)[::-1]
    run(study, studio, jobs[:6])
    found = beds.pictures(out)
    assert len(found) == 6
    assert all(expected[key] == picture for key, picture in found.items())
    assert len(studio.pipe.loras) == 2


def test_shards_make_the_same_pictures(bed: Path, whole: Path, tmp_path: Path) -> None:
    """Three processes' parts of four sets, one after the other."""
    words = beds.WORDS[:2]
    made = [beds.work(bed, tmp_path / "out", words, shard=(i, 3)).made for i in range(3)]
    assert made == [4, 2, 2]
    same_bytes(tmp_path / "out", whole, words)


def test_more_can_be_added_and_what_is_gone_is_made_again(bed: Path, tmp_path: Path) -> None:
    steps: list[int] = []
    done: list[str] = []
    ears = Ears(step=lambda: steps.append(1), done=lambda job, record: done.append(job.name))
    assert beds.work(bed, tmp_path, ("naive",), ears=ears).made == 4
    assert len(steps) == 4 * 4
    assert len(set(done)) == 4
    before = beds.pictures(tmp_path)
    lost = tmp_path / next(iter(Study(tmp_path).records().values())).image
    lost.unlink()
    outcome = beds.work(bed, tmp_path, ("naive", "merge"))
    assert (outcome.made, outcome.kept) == (5, 3)
    found = beds.pictures(tmp_path)
    assert len(found) == 8
    assert {key: found[key] for key in before} == before


def test_another_study_is_refused(bed: Path, whole: Path, tmp_path: Path) -> None:
    other = beds.save_bed(tmp_path / "bed", steps=5)
    with pytest.raises(CmloraError, match=r"another testbed \(steps: there 4, here 5\); choose"):
        beds.work(other, whole)
    with pytest.raises(CmloraError, match="holds no run"):
        Study(tmp_path).settings()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "another dtype (there float16, here float32)"),
        ({"options": {"tau": "2"}}, "another options (tau: there 2, here nothing)"),
        ({"model_hash": "abc"}, "another model_hash (there abc, here "),
        (
            {"testbed": {"steps": 9, "width": 9, "height": 9, "guidance_scale": 9}},
            "steps: there 9, here 4; ",
        ),
        ({"loras": [{"id": "cat", "sha256": "0"}]}, "another loras (cat"),
    ],
)
def test_what_differs_is_named(
    bed: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    study = Study(tmp_path)
    studio = beds.open_studio(bed)
    study.begin(studio, {}, None)
    settings = study.settings()
    for key, value in changes.items():
        inner = settings[key]
        settings[key] = {**inner, **value} if isinstance(inner, dict) else value
    study.file.write_text(json.dumps(settings))
    with pytest.raises(CmloraError) as refusal:
        study.begin(studio, {}, None)
    assert message in str(refusal.value)
    assert len(str(refusal.value)) < 500


def test_what_an_interruption_leaves_is_cleared_away(
    bed: Path, whole: Path, tmp_path: Path
) -> None:
    """A half-written picture, a picture without a record, and a line that was cut short."""
    studio, study = beds.open_studio(bed), Study(tmp_path)
    study.begin(studio, {}, None)
    jobs = beds.jobs_in(studio, ("naive",))
    first = tmp_path / study.image_name(jobs[0])
    first.parent.mkdir(parents=True)
    orphan = first.parent / f".{first.name}.abc123"
    orphan.write_bytes(b"half")
    first.write_bytes(b"not recorded")
    part = tmp_path / "records" / "part-00000.jsonl"
    part.parent.mkdir()
    part.write_bytes(b'{"key":"0000","error":"x"}\n{"key":"12')
    run(study, studio, jobs)
    assert not orphan.exists()
    found = beds.pictures(tmp_path)
    assert len(found) == 4
    assert all(beds.pictures(whole)[key] == picture for key, picture in found.items())
    assert len(rows([part])) == 5


def test_failures_are_retried_and_do_not_stop_the_rest(
    bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio, study = beds.open_studio(bed), Study(tmp_path)
    jobs = beds.jobs_in(studio, ("naive",))
    study.begin(studio, {}, None)
    tries: dict[str, int] = {}
    real = studio.render

    def shaky(ids: Any, recipe: Any, on_step: Any = lambda: None) -> Any:
        key = f"{ids}"
        tries[key] = tries.get(key, 0) + 1
        if ids == jobs[1].ids or (ids == jobs[2].ids and tries[key] == 1):
            raise RuntimeError("out of\nmemory")
        return real(ids, recipe, on_step)

    monkeypatch.setattr(studio, "render", shaky)
    outcome = run(study, studio, jobs)
    assert outcome.made == 3
    assert outcome.failed == {jobs[1].name: "RuntimeError: out of memory"}
    assert study.failures() == {jobs[1].key: "RuntimeError: out of memory"}
    monkeypatch.undo()
    assert run(study, studio, jobs).made == 1
    assert study.failures() == {}


def test_hopeless_work_is_given_up(
    bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio, study = beds.open_studio(bed), Study(tmp_path)
    study.begin(studio, {}, None)
    monkeypatch.setattr(runner, "PATIENCE", 3)
    monkeypatch.setattr(studio, "render", None)
    with pytest.raises(CmloraError, match="3 jobs in a row failed"):
        run(study, studio, beds.jobs_in(studio))


def test_a_shard_belongs_to_one_process(tmp_path: Path) -> None:
    path = tmp_path / "records" / "part-00000.jsonl"
    with Journal(path), pytest.raises(CmloraError, match="another process"):
        Journal(path).__enter__()
    with Journal(path) as journal:
        journal.append({"a": 1})
    assert rows([path]) == [{"a": 1}]
    path.write_bytes(b'{"a":1}\nbroken\n{"a":2}\n')
    with pytest.raises(CmloraError, match="line 2 is damaged"):
        rows([path])


def test_shards_from_text_and_from_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_shard("2/5") == Shard(2, 5)
    for wrong in ("5/5", "1", "a/b", "-1/2"):
        with pytest.raises(CmloraError, match="INDEX/COUNT"):
            read_shard(wrong)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launched() == Shard(3, 8, 1)
    parts = [Shard(i, 8).share(range(30)) for i in range(8)]
    assert sorted(n for part in parts for n in part) == list(range(30))


def test_one_pass_is_timed(bed: Path) -> None:
    studio = beds.open_studio(bed)
    assert 0 < estimate(studio, beds.jobs_in(studio)[0]) < 60


def test_options_go_to_the_methods_that_have_them(bed: Path) -> None:
    studio = beds.open_studio(bed)
    sets = studio.manifest.sample(2, 1)
    jobs = jobs_of(studio, sets, read(("merge", "switch")), (0,), {"tau": "2"})
    assert [job.recipe.options for job in jobs] == [{}, {"tau": 2}]
    with pytest.raises(CmloraError, match="none of the methods has option 'tua'"):
        jobs_of(studio, sets, read(("merge", "switch")), (0,), {"tua": "2"})


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.eval.beds", "diffusers", "torch", "cmlora.compose"])
FORK = multiprocessing.get_context("fork")
QUICK = ("naive", "cmlora@nonuniform")
KILLS = 30
PATIENCE = 1800  # seconds; for machines that have other work


def same_bytes(out: Path, whole: Path, words: tuple[str, ...]) -> None:
    """All pictures of some methods, as they are in the undisturbed study."""
    labels = {key: record.label for key, record in Study(whole).records().items()}
    expected = {k: v for k, v in beds.pictures(whole).items() if labels[k] in words}
    assert beds.pictures(out) == expected


def started(bed: Path | str, out: Path, shard: tuple[int, int], studio: Any = None) -> Any:
    """A shard's process, on its way: a new one, or a copy of this one with its open studio."""
    arguments = (bed, out, QUICK, shard, None, studio)
    process = (CONTEXT if studio is None else FORK).Process(target=beds.work, args=arguments)
    process.start()
    return process


def kill(process: Any) -> None:
    """End a process in the middle of whatever it does, unless it is done."""
    if process.is_alive():
        os.kill(process.pid or 0, signal.SIGKILL)
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)


def lines(out: Path) -> int:
    return sum(p.read_bytes().count(b"\n") for p in (out / "records").glob("*.jsonl"))


def await_lines(out: Path, more: int, process: Any) -> None:
    """Until so many further lines are written, or the process is done."""
    target = lines(out) + more
    while process.is_alive() and lines(out) < target:
        time.sleep(0.002)


def test_killed_studies_go_on(bed: Path, whole: Path, tmp_path: Path) -> None:
    """Killed in the second picture, and again in the next; `slow` tests do it at any moment."""
    rng = random.Random(3)
    for _ in range(2):
        process = started(bed, tmp_path, (0, 1))
        await_lines(tmp_path, 1, process)
        time.sleep(rng.uniform(0, 0.05))
        kill(process)
    assert 2 <= lines(tmp_path) < 8
    finished(bed, whole, tmp_path, 1)


@pytest.fixture(scope="module", params=["tiny", "emoji"])
def world(request: Any, bed: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A testbed, its studio with everything loaded, and a study that nothing interrupted."""
    place = bed if request.param == "tiny" else "emoji"
    torch.set_num_threads(1)  # as processes that are forked need it
    studio = beds.open_studio(place)
    whole = tmp_path_factory.mktemp("undisturbed") / "whole"
    assert beds.work(place, whole, QUICK, studio=studio).made == 8
    return place, studio, whole


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_thirty_kills(world: Any, tmp_path: Path, count: int) -> None:
    """At random moments of the work, which goes on at once; several die side by side."""
    place, studio, whole = world
    rng = random.Random(count)
    killed = 0
    while killed < KILLS:
        processes = [started(place, tmp_path, (number, count), studio) for number in range(count)]
        for process in rng.sample(processes, count):
            await_lines(tmp_path, rng.choice((0, 0, 1)), process)
            time.sleep(rng.uniform(0, 0.5))
            alive = process.is_alive()
            kill(process)
            killed += alive
        if lines(tmp_path) == 8:
            for path in (tmp_path / "records").glob("*.jsonl"):
                path.unlink()  # pictures stay, and are made again over themselves
    finished(place, whole, tmp_path, count, studio)


def finished(bed: Path | str, whole: Path, out: Path, count: int, studio: Any = None) -> None:
    """After a last undisturbed start of every shard: each job once, and the same bytes."""
    processes = [started(bed, out, (number, count), studio) for number in range(count)]
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    records = rows((out / "records").glob("*.jsonl"))
    assert len({row["key"] for row in records}) == len(records) == 4 * len(QUICK)
    same_bytes(out, whole, QUICK)
    assert not [p for p in (out / "images").rglob("*") if p.is_file() and p.suffix != ".png"]
    studio = studio or beds.open_studio(bed)
    assert pending(Study(out), beds.jobs_in(studio, QUICK)) == []


def test_prompts_are_encoded_once_and_never_for_other_loras(bed: Path) -> None:
    """Text encoders with LoRAs: what is remembered is what would be encoded."""
    from cmlora.eval.studio import _Speech
    from tests import tiny

    pipe = tiny.sd15()
    tiny.add_loras(pipe, ("cat", "hat"), text=True)
    said: list[Any] = []
    real = pipe.encode_prompt
    pipe.text_encoder.register_forward_hook(lambda *_: said.append(1))
    speech = _Speech(pipe)
    for names, weights in ((["cat"], [1.0]), (["hat"], [1.0]), (["cat"], [0.5])):
        pipe.set_adapters(names, weights)
        expected = real("a cat", torch.device("cpu"), 1, True)
        before = len(said)
        for _ in range(2):
            with speech:
                found = pipe.encode_prompt("a cat", torch.device("cpu"), 1, True)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            found[0].zero_()
        assert len(said) == before + 2  # prompt and empty prompt, the first time only
    assert "encode_prompt" not in vars(pipe)
