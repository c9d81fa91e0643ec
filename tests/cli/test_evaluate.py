"""`cmlora evaluate` on a tiny testbed, from the command line."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from cmlora.cli.app import app
from cmlora.eval.study import Study
from tests import disk
from tests.eval import beds
from tests.eval.made import make_study
from tests.eval.server import Chat, fair, served

COMMANDS = sorted(get_command(app).commands["evaluate"].commands)  # type: ignore[attr-defined]
ROOT = Path(__file__).parent.parent.parent


def call(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["evaluate", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


def call_json(*arguments: str) -> Any:
    return json.loads(call(*arguments, "--json").stdout)


def test_methods_that_the_readme_reports_are_those_it_runs() -> None:
    """Its commands are carried out in the order they are printed."""
    lines = [x for x in (ROOT / "README.md").read_text().splitlines() if "cmlora evaluate" in x]
    made = next(line for line in lines if line.endswith("--out run"))
    report = next(line for line in lines if "evaluate report run" in line and "--methods" in line)
    ran, shown = (
        set(words[words.index("--methods") + 1].split(","))
        for words in map(str.split, (made, report))
    )
    assert shown <= ran


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny testbed; read only."""
    return beds.save_bed(tmp_path_factory.mktemp("beds") / "tiny", steps=2)


@pytest.fixture(scope="module")
def small(bed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; read only, but for scores and verdicts."""
    out = tmp_path_factory.mktemp("runs") / "run"
    made = call_json("run", *here(bed), "--out", str(out))
    assert (made["made"], made["kept"], made["failed"]) == (4, 0, {})
    return out


def here(bed: Path) -> list[str]:
    """Two sets, two methods, one seed."""
    return [
        str(bed),
        "--lora-dir",
        str(bed),
        *["--methods", "naive,merge", "--n", "2", "--sets", "2"],
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_json(name: str) -> None:
    said = call(name, "--help").stdout
    assert "Example:" in said
    assert f"cmlora evaluate {name}" in said
    assert "--json" in said


def test_the_commands() -> None:
    assert COMMANDS == ["correlate", "init", "judge", "paper", "report", "run", "score"]


def test_a_run_is_continued(bed: Path, small: Path) -> None:
    again = call_json("run", *here(bed), "--out", str(small))
    assert (again["made"], again["kept"], again["jobs"]) == (0, 4, 4)
    less = call_json("run", *here(bed), "--out", str(small), "--limit", "1")
    assert (less["made"], less["kept"], less["jobs"]) == (0, 1, 1)


def test_a_dry_run_makes_nothing(bed: Path, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = call_json("run", *here(bed), "--out", str(out), "--dry-run", "--seeds", "0-1")
    assert (planned["jobs"], planned["done"]) == (8, 0)
    assert planned["seconds"] > 0
    assert not out.exists()
    records = Study(small).records().values()
    assert planned["macs"] == 2 * sum(record.macs or 0 for record in records)
    done = call_json("run", *here(bed), "--out", str(small), "--dry-run")
    assert (done["done"], done["macs"], done["seconds"]) == (4, 0, 0)
    shown = call("run", *here(bed), "--out", str(small), "--dry-run").stdout
    assert "4 jobs, about 0 h" in shown
    variants = ["switch[tau=1]", "cmlora[order=low_first]"]
    own = ("--methods", ",".join(variants), "--out", str(out), "--dry-run")
    said = call("run", *here(bed), *own).stdout
    assert all(variant in said for variant in variants)


def test_it_is_a_plain_script(bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m cmlora.eval run ...`, one of two parts as a launcher would start it."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["cmlora.eval", "run", *here(bed), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("cmlora.eval", run_name="__main__")
    assert ended.value.code == 0
    assert len(Study(tmp_path).records()) == 2
    assert [p.name for p in (tmp_path / "records").iterdir()] == ["part-00001.jsonl"]
    call("run", *here(bed), "--out", str(tmp_path), "--shard", "0/2")
    assert len(Study(tmp_path).records()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "accelerate"])
def test_launched_for_real(bed: Path, small: Path, tmp_path: Path, launcher: str) -> None:
    starts = {
        "python": [sys.executable],
        "accelerate": [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
            *[
                "--num_processes",
                "2",
                "--num_machines",
                "1",
                "--mixed_precision",
                "no",
                "--dynamo_backend",
                "no",
            ],
        ],
    }
    command = [*starts[launcher], "-m", "cmlora.eval", "run", *here(bed), "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert beds.pictures(tmp_path) == beds.pictures(small)
    parts = sorted(p.name for p in (tmp_path / "records").iterdir())
    assert parts == [f"part-0000{i}.jsonl" for i in range(2 if launcher == "accelerate" else 1)]


def test_failures_are_an_exit_code(
    bed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmlora.eval import runner

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(runner, "make", broken)
    result = call("run", *here(bed), "--out", str(tmp_path), code=1)
    assert "4 failed" in result.stderr
    assert "RuntimeError: no memory" in result.stderr


def test_scores_and_reports(small: Path, tmp_path: Path) -> None:
    assert call_json("score", str(small), "--scorers", "sanity,cost")["scored"] == {
        "sanity": 4,
        "cost": 4,
    }
    assert call_json("score", str(small), "--scorers", "sanity")["scored"] == {"sanity": 0}
    listed = call_json("score", str(small), "--list")
    assert {"clip_score", "probe", "dino_image"} <= {row["name"] for row in listed}
    files = call_json("report", str(small), "--out", str(tmp_path), "--gallery", "1")["files"]
    assert str(tmp_path / "report.html") in files
    text = (tmp_path / "report.md").read_text()
    assert "sharpness" in text
    only = call_json("report", str(small), "--out", str(tmp_path), "--metrics", "gmacs")
    assert only["files"]
    assert "sharpness" not in (tmp_path / "report.md").read_text()


def test_a_judge_behind_a_server(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EYE_KEY", "secret")
    with served(Chat(fair)) as chat:
        where = ["--model", "eye", "--base-url", chat.url, "--key-variable", "EYE_KEY"]
        said = call_json("judge", str(small), *where, "--prices", "1,1")
        again = call_json("judge", str(small), *where)
    assert (said["asked"], again["asked"]) == (4, 0)
    assert said["judges"][0]["pairs"] == 2
    assert said["judges"][0]["cost"] == pytest.approx(4 * 1100e-6)
    assert set(said["judges"][0]["win_rates"]) == {"merge", "naive"}
    assert chat.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in json.dumps(said)
    call("report", str(small))
    assert "Ranking, overall" in (small / "report" / "report.md").read_text()
    form = json.loads((small / "report" / "scores.json").read_text())
    assert "eye at 127.0.0.1, four, overall" in form["items"][0]["metrics"]
    for item in form["items"]:
        item["human"] = {"quality": {"anna": item["metrics"]["eye at 127.0.0.1, four, overall"]}}
    scores = small / "rated.json"
    scores.write_text(json.dumps(form))
    found = {row["metric"]: row for row in call_json("correlate", str(scores))["correlations"]}
    assert found["eye at 127.0.0.1, four, overall"]["spearman"]["value"] == pytest.approx(1)


def test_a_folder_becomes_a_testbed(tmp_path: Path) -> None:
    for name in ("cat", "hat", "ink"):
        disk.save_lora(tmp_path, name)
    made = call_json("init", str(tmp_path), "--model", "owner/model")
    assert made["sets"] == {"2": 3, "3": 1, "4": 0, "5": 0}
    assert json.loads((tmp_path / "testbed.json").read_text())["model"] == "owner/model"


def test_papers_and_people(tmp_path: Path) -> None:
    assert "| LoRA Merge | published | 33.73 |" in call("paper", "--tables", "clip_score").stdout
    run = make_study(tmp_path / "run", sets=2, sizes=(2,))
    tables = call_json("paper", str(run.folder))
    assert any("measured, emoji" in row for table in tables for row in map(str, table["rows"]))
    items = [
        {"id": str(i), "method": "m", "human": {"q": {"anna": i % 4}}, "metrics": {"x": i % 5}}
        for i in range(12)
    ]
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"cmlora_scores": 1, "items": items}))
    found = call_json("correlate", str(scores))
    assert found["correlations"][0]["items"] == 12
    assert "Metrics against people" in call("correlate", str(scores)).stdout


MISTAKES = [
    (["run", "emojy"], "no testbed 'emojy'"),
    (["run", "BED", "--n", "two"], "--n 'two': expected numbers such as 2,3 or 2-5"),
    (["run", "BED", "--n", "6"], "testbed tiny has no sets of 6 LoRAs"),
    (["run", "BED", "--methods", "mergee"], "did you mean merge"),
    (["run", "BED", "--sets", "0"], "--sets 0: at least 1"),
    (["run", "BED", "--shard", "2/2"], "--shard '2/2'"),
    (["run", "composlora-anime"], "name the folder with character_1.safetensors in it"),
    (["run", "BED", "--lora-dir", "/no/such"], "LoRA folder /no/such does not exist"),
    (["score", "BED"], "holds no run"),
    (["score", "RUN", "--scorers", "clip_scor"], "did you mean clip_score"),
    (["score", "RUN", "--scorers", "sanity", "--set", "clip_score.model=x"], "scorers are sanity"),
    (["report", "RUN", "--baseline", "switch"], "no pictures of 'switch'"),
    (["judge", "RUN", "--model", "/no/such/model"], "hf download /no/such/model"),
    (["judge", "RUN", "--model", "m", "--base-url", "localhost:8000"], "expected http(s)"),
    (["judge", "RUN", "--model", "m", "--protocol", "seven"], "no protocol 'seven'"),
    (["judge", "RUN", "--model", "m", "--base-url", "http://h", "--prices", "x"], "--prices 'x'"),
    (["correlate", "/no/such.json"], "cannot read /no/such.json"),
    (["paper", "--tables", "one"], "no published table 'one'"),
    (["init", "BED", "--model", "m"], "exists already"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_one_line(
    bed: Path, small: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"BED": str(bed), "RUN": str(small)}
    given = [places.get(word, word) for word in arguments]
    if given[0] == "run":
        given += ["--out", str(tmp_path / "out")]
        given += [] if "--lora-dir" in given or "composlora-anime" in given else here(bed)[1:3]
    result = call(*given, code=2)
    assert message in result.stderr
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
