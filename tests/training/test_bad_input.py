"""Everything that can be wrong with what `cmlora train` is given: one line, and exit code 2."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cmlora.adapters.training import Trainer, read_folder
from cmlora.adapters.training.settings import read
from cmlora.cli.app import app
from cmlora.pipelines.models import open_pipeline
from tests.training import bench
from tests.training.test_trouble import room

SMALL = (
    "--resolution", 32, "--steps", 3, "--rank", 2, "--targets", "to_q", "--rate", 0.01,
    "--set", "save_every=1",
)  # fmt: skip


def told(*arguments: Any) -> str:
    """The one line that a refused training says."""
    done = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert not done.stdout
    return lines[0]


def no_pictures(data: Path) -> None:
    for file in data.iterdir():
        file.unlink()


def unreadable(data: Path) -> None:
    (data / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")


def cut_short(data: Path) -> None:
    file = data / "1.png"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lone_caption(data: Path) -> None:
    (data / "9.txt").write_text("nobody")


def lone_row(data: Path) -> None:
    (data / "metadata.jsonl").write_text('{"file_name": "7.png", "text": "a cat"}\n')


def uncaptioned(data: Path) -> None:
    (data / "0.txt").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_pictures, "data holds no pictures"),
        (unreadable, "0.png cannot be read as a picture"),
        (cut_short, "1.png cannot be read as a picture"),
        (lone_caption, "9.txt is a caption without a picture"),
        (lone_row, "there is no picture 7.png"),
        (uncaptioned, "0.png has no caption; write one to 0.txt, or give a trigger word"),
    ],
)
def test_folders_of_pictures(spoil: Any, message: str, tmp_path: Path) -> None:
    data = bench.pictures(tmp_path / "data", 2)
    spoil(data)
    assert message in told("--data", data, "--out", tmp_path / "out", *SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--targets", "to_qq"), "no layer of the unet is called 'to_qq'; near names: "),
        (("--set", "text_targets=q_prj"), "text_encoder is called 'q_prj'; near names: "),
        (("--rank", 9999), "rank is 9999, and unet."),
        (("--set", "timesteps=shifted"), "timesteps shifted is for flow models"),
        (("--set", "prior_data=x"), "prior_prompt is missing"),
        (("--set", "options.rr=3"), "lora has no option 'rr'; did you mean r?"),
    ],
)
def test_settings_that_the_model_does_not_allow(
    arguments: tuple[Any, ...], message: str, model_folder: Path, tmp_path: Path
) -> None:
    data = bench.pictures(tmp_path / "data", 2)
    given = ("--data", data, "--model", model_folder, "--out", tmp_path / "out", *SMALL)
    assert message in told(*given, *arguments)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_resuming_with_something_else(model_folder: Path, tmp_path: Path) -> None:
    data = bench.pictures(tmp_path / "data", 2)
    given = ("--data", data, "--model", model_folder, "--out", tmp_path / "out", *SMALL)
    interrupt(data, model_folder, tmp_path / "out")
    before = (tmp_path / "out" / "checkpoint.safetensors").read_bytes()
    said = told(*given, "--rate", 0.5)
    assert "rate was 0.01 and is 0.5 now; resume with the same settings, or choose another" in said
    assert "tuner was 'lora' and is 'svfit' now" in told(*given, "--tuner", "svfit")
    (data / "0.txt").write_text("a dog")
    assert "is of other pictures or captions" in told(*given)
    assert (tmp_path / "out" / "checkpoint.safetensors").read_bytes() == before


def test_a_full_disk(model_folder: Path, tmp_path: Path) -> None:
    data = bench.pictures(tmp_path / "data", 2)
    given = ("--data", data, "--model", model_folder, "--out", tmp_path / "out", *SMALL)
    interrupt(data, model_folder, tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint.safetensors"
    before = checkpoint.read_bytes()
    with room(len(before) // 2):
        said = told(*given)
    assert "cannot write" in said
    assert "File too large" in said
    assert checkpoint.read_bytes() == before
    done = CliRunner().invoke(app, ["train", *map(str, given)])
    assert done.exit_code == 0, done.output


def interrupt(data: Path, model: Path, output: Path) -> None:
    """A training of the same settings that ended after its first step."""
    settings = read(
        None,
        {
            "data": str(data), "model": str(model), "output": str(output), "resolution": 32,
            "steps": 3, "rank": 2, "targets": "to_q", "rate": 0.01, "save_every": 1,
        },
    )  # fmt: skip
    pipe = open_pipeline(str(model))
    with pytest.raises(ConnectionError):
        Trainer(pipe, settings, read_folder(data)).run(bench.stop_at(1))
