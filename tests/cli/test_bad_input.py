"""Every mistake gets one line that helps, exit code 2, nothing on stdout and no traceback."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import disk
from tests.calling import complaint


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, lora_folder: Path) -> Path:
    """LoRA files that are each wrong in their own way."""
    folder = tmp_path_factory.mktemp("bad")
    good = (lora_folder / "cat.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(good[: len(good) // 2])
    (folder / "empty.safetensors").touch()
    (folder / "pickled.safetensors").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    tensors = load_file(lora_folder / "cat.safetensors")
    tensors[min(tensors)].fill_(torch.nan)
    save_file(tensors, folder / "nan.safetensors")
    disk.save_lora(folder, "other", wide=2)
    return folder


def generate(model: Path, folder: Path, *arguments: str) -> list[str]:
    out = ["--out", str(folder / "never.png")]
    return ["generate", "--model", str(model), "--prompt", "a cat", *out, *arguments]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated", "cut short"),
        ("empty", "is empty"),
        ("pickled", "pickle"),
        ("nan", "nan.safetensors"),
        ("other", "other.safetensors"),
        ("missing", "no such file"),
    ],
)
def test_lora_files(model_folder: Path, tmp_path: Path, bad: Path, name: str, message: str) -> None:
    path = str(bad / f"{name}.safetensors")
    said = complaint(generate(model_folder, tmp_path, "--lora", path))
    assert message in said
    assert name in said
    assert not (tmp_path / "never.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "compsite"], "did you mean composite"),
        (["--method", "cmlora"], "no LoRAs to compose"),
        (["--method", "naive", "--option", "tau"], "expected KEY=VALUE"),
        (["--method", "switch", "--option", "tua=3"], "no option 'tua'"),
        (["--method", "switch", "--option", "tau=much"], "tau is 'much'"),
        (["--method", "naive", "--cache", "sometimes"], "unknown cache policy"),
        (["--method", "naive", "--steps", "0"], "steps"),
        (["--method", "naive", "--steps", "-3"], "steps"),
        (["--method", "naive", "--prompt", " "], "no prompt"),
        (["--method", "naive", "--size", "big"], "expected a number of pixels"),
        (["--method", "naive", "--size", "31"], "multiple"),
        (["--method", "naive", "--cut", "deep"], "expected LAYER,BLOCK"),
        (["--method", "naive", "--text-encoder", "some"], "text_encoder"),
        (["--method", "naive", "--guidance", "nan"], "guidance"),
        (["--method", "naive", "--role", "cat=high"], "role for 'cat'"),
        (["--method", "naive", "--scope", "cat=global"], "scope for 'cat'"),
        (["--scope", "cat=wide"], "--scope cat=wide: a scope is global or local"),
        (["--lora", "cat:strong"], "a number as weight"),
        (["--lora", "cat:nan"], "a number as weight"),
        (["--lora", "cat:inf"], "a number as weight"),
        (["--lora", "cta"], "'cta' not found"),
        (["--model", "no_such_model"], "no model 'no_such_model'"),
        (["--out", "picture.bmp"], "written as .png"),
        (["--out", "no/such/folder/a.png"], "no folder"),
        (["--recipe", "missing.png"], "missing.png"),
        (["--dtype", "float7"], "float7"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_generate(model_folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in complaint(generate(model_folder, tmp_path, *arguments))


def test_an_unknown_lora_is_followed_by_those_there_are(
    model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    here = ["--lora-dir", str(lora_folder), "--lora"]
    said = complaint(generate(model_folder, tmp_path, *here, "xyz"))
    assert "'xyz' not found; there is no such file; known: cat, " in said
    said = complaint(generate(model_folder, tmp_path, *here, "cta"))
    assert "'cta' not found; did you mean cat" in said
    assert "? known: cat, " in said


def test_nothing_to_say_without_a_prompt(model_folder: Path) -> None:
    said = complaint(["generate", "--model", str(model_folder), "--method", "naive"])
    assert "no --prompt" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loras", ""], "name at least one LoRA"),
        (["--loras", "cat", "--methods", "merge,mergo"], "unknown composition method 'mergo'"),
        (["--loras", "cat", "--methods", "merge,merge@none"], "listed twice"),
        (["--loras", "cat", "--seeds", "3-1"], "not like 7 or 0-3"),
        (["--loras", "cat", "--seeds", "1,1"], "listed twice"),
        (["--loras", "cat", "--seeds", ""], "not like 7 or 0-3"),
        (["--loras", "cat", "--steps", "0"], "steps"),
        (["--loras", "cta"], "did you mean cat"),
        (["--loras", "cat", "--methods", "merge", "--option", "tau=1"], "none of the methods"),
        (["--loras", "cat,hat", "--methods", "lorahub"], "no score for this model"),
    ],
)
def test_compare(
    model_folder: Path, lora_folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    common = ["compare", "--model", str(model_folder), "--lora-dir", str(lora_folder)]
    out = ["--out", str(tmp_path / "out"), "--prompt", "a cat"]
    assert message in complaint([*common, *out, *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cost", "--loras", "0"], "at least 1"),
        (["cost", "--size", "100"], "multiples of 8"),
        (["cost", "--cut", "7,7"], "cannot cut"),
        (["cost", "--model", "sd51"], "no model 'sd51'"),
        (["inspect", "missing.safetensors"], "not found"),
        (["profile", "cat", "--model", "nowhere"], "no model 'nowhere'"),
    ],
)
def test_other_commands(arguments: list[str], message: str) -> None:
    assert message in complaint(arguments)


def test_inspect_refuses_a_pickle_under_any_name(bad: Path) -> None:
    assert "pickle" in complaint(["inspect", str(bad / "pickled.safetensors")])


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from cmlora.cli.app import main; main()", *arguments]


@pytest.mark.parametrize(
    "arguments",
    [
        ["cost", "--loras", "none"],
        ["generate", "--lora", "cat:strong"],
        ["no-such-command"],
    ],
)
def test_a_real_process_fails_the_same_way(arguments: list[str]) -> None:
    ended = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr
    assert "Traceback" not in ended.stderr


def test_interrupting_keeps_what_is_finished(
    model_folder: Path, lora_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = subprocess.Popen(
        command(
            *("compare", "--model", str(model_folder), "--lora-dir", str(lora_folder)),
            *("--loras", "cat,hat", "--methods", "merge", "--prompt", "a cat"),
            *("--steps", "4", "--seeds", "0-9999", "--out", str(out)),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts the tests in the background makes them ignore the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (out / "merge_2.png").exists():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.1)
    os.kill(run.pid, signal.SIGINT)
    stdout, stderr = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in stderr
    assert stdout == ""
    assert (out / "results.json").exists()
    left = sorted(path.name for path in out.iterdir())
    assert all(name == "results.json" or name.startswith("merge_") for name in left), left
