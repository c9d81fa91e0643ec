"""The package list, the links and the weight of `import cmlora`."""

import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}


def run_python(code: str) -> str:
    """What a fresh interpreter at the repository's root prints for `code`."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_every_package_on_disk_is_declared() -> None:
    on_disk = {
        ".".join((name, *init.parent.relative_to(folder).parts))
        for name, folder in FOLDERS.items()
        for init in folder.rglob("__init__.py")
    }
    assert on_disk == set(SETUPTOOLS["packages"])


def test_links_point_at_their_folders() -> None:
    for name, folder in FOLDERS.items():
        link = ROOT.joinpath(*name.split("."))
        if link.is_symlink():  # a checkout without symlinks has a small text file here
            assert link.resolve() == folder


def test_every_module_of_ours_is_called_cmlora() -> None:
    ours = {"adapters", "eval", "pipelines", "ui"}
    assert not ours & set(sys.modules)


@pytest.mark.parametrize("heavy", ["torch", "diffusers", "transformers", "gradio", "open_clip"])
def test_importing_the_package_loads_nothing_heavy(heavy: str) -> None:
    assert run_python(f"import sys, cmlora; print({heavy!r} in sys.modules)") == "False\n"


def test_import_time_is_printed() -> None:
    def seconds(code: str) -> float:
        start = time.perf_counter()
        run_python(code)
        return time.perf_counter() - start

    empty, ours = seconds("pass"), seconds("import cmlora")
    print(f"import cmlora: {ours - empty:+.3f} s beside an empty interpreter")
    assert run_python("import cmlora; print(cmlora.__version__)").strip()


def test_compose_stays_the_function_after_its_file_is_imported() -> None:
    code = "import cmlora.compose, cmlora; print(callable(cmlora.compose))"
    assert run_python(code) == "True\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    import cmlora

    with pytest.raises(AttributeError, match="no attribute 'composed'"):
        _ = cmlora.composed  # type: ignore[attr-defined]
