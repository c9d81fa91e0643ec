"""`cmlora doctor` as a user meets it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cmlora.cli.app import app
from cmlora.files import read, write
from cmlora.schedules.parse import parse_schedule, write_schedule
from tests import disk
from tests.calling import complaint, run, run_json


def test_a_report_and_a_plot(lora_folder: Path, tmp_path: Path) -> None:
    files = [str(lora_folder / f"{name}.safetensors") for name in ("cat", "hat")]
    plot = tmp_path / "conflicts.svg"
    arguments = ["doctor", *files, "--plot", str(plot)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report["loras"]) == {"cat", "hat"}
    assert abs(report["pairs"][0]["cosine"]) < 0.5
    assert report["advice"]
    assert plot.read_text().startswith("<svg")
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    result = CliRunner().invoke(app, [*arguments, "--force"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "because" in result.stdout


@pytest.mark.parametrize(
    ("name", "message"), [("nan", "lora_"), ("missing", "not found"), ("other", "cannot be used")]
)
def test_one_line_for_a_mistake(lora_folder: Path, tmp_path: Path, name: str, message: str) -> None:
    tensors = load_file(lora_folder / "hat.safetensors")
    tensors[min(tensors)].fill_(torch.nan)
    save_file(tensors, tmp_path / "nan.safetensors")
    disk.save_lora(tmp_path, "other", wide=2)
    files = [str(lora_folder / "cat.safetensors"), str(tmp_path / f"{name}.safetensors")]
    result = CliRunner().invoke(app, ["doctor", *files])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len([line for line in result.stderr.splitlines() if line.strip()]) == 1
    assert message in result.stderr
    assert name in result.stderr


def test_the_advice_is_a_recipe_that_can_be_drawn(tmp_path: Path) -> None:
    advice, picture = tmp_path / "advice.json", tmp_path / "a.png"
    names = ["style_1", "character_2", "character_1"]
    report = run_json("doctor", *names, "--base", "emoji", "--recipe", advice)
    proposal = json.loads(advice.read_text())
    assert report["recipe"] == proposal
    assert f"cmlora generate --recipe {advice}" in run(
        "doctor", *names, "--recipe", advice, "--force"
    )
    assert "--force" in complaint(["doctor", *names, "--recipe", advice])
    draw: list[str | Path] = ["generate", "--recipe", advice, "--steps", "1", "--out", picture]
    drawn = run_json(*draw)["recipe"]
    weights = {lora["name"]: lora["weight"] for lora in proposal["loras"]}
    assert {lora["name"]: lora["weight"] for lora in drawn["loras"]} == weights
    assert set(weights) == set(names)
    assert drawn["order"] == proposal["order"]
    assert (drawn["method"], drawn["cache"]) == (proposal["method"], proposal["cache"])
    assert drawn["options"].items() >= proposal["options"].items()
    assert drawn.get("schedule", "") == proposal["schedule"]


def test_what_is_asked_for_besides_comes_first(
    model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    advice, picture = tmp_path / "advice.json", tmp_path / "a.png"
    cat = read(lora_folder / "cat.safetensors")
    hat = {
        m: replace(u, scale=9.0) for m, u in read(lora_folder / "hat.safetensors").updates.items()
    }
    loud = {m: cat.updates[m] if i % 3 else hat[m] for i, m in enumerate(cat.updates)}
    known = {"cmlora.category": "character"}
    files = [tmp_path / f"{name}.safetensors" for name in ("loud", "hat")]
    write(replace(cat, name="loud", updates=loud, metadata=known), files[0])
    write(replace(read(lora_folder / "hat.safetensors"), metadata=known), files[1])
    proposal = run_json("doctor", *files, "--recipe", advice)["recipe"]
    assert [lora["weight"] for lora in proposal["loras"]] == [0.5, 1.0]
    assert proposal["schedule"] == "[<lora:loud:1>|<lora:hat:1>:0.1]"
    assert (proposal["method"], proposal["order"]) == ("gate", ["hat", "loud"])
    draw: list[str | Path] = ["generate", "--recipe", advice, "--model", model_folder]
    draw += ["--steps", "1", "--guidance", "1", "--out", picture]
    drawn = run_json(*draw)["recipe"]
    assert [lora["weight"] for lora in drawn["loras"]] == [1.0, 0.5]
    assert (drawn["method"], drawn["order"]) == (proposal["method"], proposal["order"])
    assert drawn["schedule"] == write_schedule(parse_schedule(proposal["schedule"]))
    more: list[str | Path] = [
        "--lora",
        f"{files[0]}:0.25",
        "--lora",
        lora_folder / "ink.safetensors",
    ]
    more += ["--method", "switch", "--option", "tau=2", "--schedule", "<lora:hat:0.5>"]
    drawn = run_json(*draw, *more)["recipe"]
    assert {x["name"]: x["weight"] for x in drawn["loras"]} == {"loud": 0.25, "hat": 1, "ink": 1}
    assert drawn["order"] == [*proposal["order"], "ink"]
    assert (drawn["method"], drawn["options"]) == ("switch", {"tau": 2})
    assert drawn["schedule"] == write_schedule(parse_schedule("<lora:hat:0.5>"))
    said = run_json(*draw, *more, "--schedule", "", "--order", "loud,ink,hat")
    assert said["report"]["full"] == {"loud": 1}
    assert "order is ('loud',)" in complaint([*draw, "--order", "loud"])
    # the recipe of a picture, as a file of its own, is drawn exactly
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps(drawn))
    again: list[str | Path] = ["generate", "--recipe", kept, "--out", picture]
    folder = ["--model", str(model_folder), "--lora-dir", str(tmp_path)]
    (tmp_path / "ink.safetensors").write_bytes((lora_folder / "ink.safetensors").read_bytes())
    assert run_json(*again, *folder)["recipe"] == drawn


def test_a_broken_recipe_is_one_line(lora_folder: Path, tmp_path: Path) -> None:
    advice, picture = tmp_path / "advice.json", tmp_path / "a.png"
    files = [lora_folder / f"{name}.safetensors" for name in ("cat", "hat")]
    run("doctor", *files, "--recipe", advice)
    good = json.loads(advice.read_text())
    draw: list[str | Path] = ["generate", "--recipe", advice, "--out", picture]
    for content, message in (
        ("{", "is not JSON"),
        ("[]", "has no key"),
        (json.dumps({**good, "method": "mrege"}), "mrege"),
        (json.dumps({**good, "order": []}), "order does not name"),
        (json.dumps({**good, "loras": good["loras"][:1]}), "order"),
        (json.dumps({**good, "loras": [{**x, "sha256": "0" * 64} for x in good["loras"]]}), "cat"),
    ):
        advice.write_text(content)
        assert message in complaint(draw)
    advice.write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in complaint(draw)
    assert "should end in .json" in complaint(["doctor", *files, "--recipe", tmp_path / "x.txt"])
    assert not picture.exists()
