"""One table of methods that were drawn in groups, each beside the same baseline."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.eval.made import make_study

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups of one run, and one of another."""
    folder = tmp_path_factory.mktemp("groups")
    one, other = make_study(folder / "run", sets=6), make_study(folder / "other", sets=5)
    for name, study, methods in (
        ("first", one, "merge,naive,switch"),
        ("second", one, "merge,composite,cmlora@nonuniform"),
        ("other", other, "merge,composite"),
        ("against", one, "naive,switch"),
    ):
        words = [str(study.folder), "--out", str(folder), "--name", name, "--methods", methods]
        words += ["--focus", methods.split(",")[0], "--baseline", methods.split(",")[0]]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["composition.py", *words, "--untimed"])
            runpy.run_path(str(BENCHMARKS / "composition.py"), run_name="__main__")
    return folder


def written(
    patch: pytest.MonkeyPatch, folder: Path, *names: str, extra: tuple[str, ...] = ()
) -> str:
    files = [str(folder / f"{name}.csv") for name in names]
    out = folder / "every_method.md"
    patch.setattr(sys, "argv", ["every_method.py", *files, "--out", str(out), *extra])
    runpy.run_path(str(BENCHMARKS / "every_method.py"), run_name="__main__")
    return out.read_text()


def test_groups_become_one_table(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = written(monkeypatch, groups, "first", "second")
    means, by_size = text.split("**concepts found**")
    rows = [line for line in means.splitlines() if line.startswith("| `")]
    names = [line.split("`")[1] for line in rows]
    assert names == ["naive", "merge", "switch", "composite", "cmlora@nonuniform"]
    for group in ("first", "second"):
        page = (groups / f"{group}.md").read_text()
        overview = page.split("**Overview**")[1].split("**concepts found**")[0]
        for line in overview.splitlines():
            if line.startswith("| `"):
                label, found = line.split(" | ")[:2]
                (ours,) = [row for row in rows if row.startswith(f"{label} |")]
                assert ours.split(" | ")[1] == found.replace("**", "")
    assert by_size.count("| `") == 5
    assert "[first.md](first.md), [second.md](second.md)" in means


def test_seconds_are_those_of_a_run_of_their_own(
    groups: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    timed = make_study(groups / "timed", sets=1, seeds=(0,))
    extra = ("--times", str(timed.folder))
    text = written(monkeypatch, groups, "first", "second", extra=extra)
    seconds = text.split("**seconds per picture**")[1]
    assert "| `composite` | 0.60 | 0.90 | 1.20 | 1.50 |" in seconds
    assert "Of 20 pictures drawn one after the other" in seconds
    small = make_study(groups / "small", sets=1, words=("merge", "naive"))
    with pytest.raises(SystemExit):
        written(monkeypatch, groups, "first", extra=("--times", str(small.folder)))
    assert "the timed run lacks pictures of switch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("first", "other"), "these are not the same pictures"),
        (("first", "against"), "the files have several baselines: merge, naive"),
        (("first", "nowhere"), "is no table of composition.py"),
    ],
)
def test_what_does_not_compare_is_refused(
    groups: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    names: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        written(monkeypatch, groups, *names)
    assert message in capsys.readouterr().err
