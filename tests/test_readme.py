"""The README: its tables are those of the program, its commands parse, its Python runs.

`python -m tests.test_readme` brings the tables up to date.
"""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cmlora.adapters.compression import COMPRESSIONS, RULES
from cmlora.adapters.merging import MERGES
from cmlora.adapters.training.optim import OPTIMIZERS
from cmlora.adapters.tuners import TUNERS
from cmlora.caching.modifiers import MODIFIERS
from cmlora.caching.policy import POLICIES
from cmlora.cli.app import app
from cmlora.cli.cost import estimate
from cmlora.eval.scorers import SCORERS
from cmlora.forms import FORMS
from cmlora.pipelines import library
from cmlora.pipelines.learning import LEARNED
from cmlora.strategies import METHODS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def cost_table() -> str:
    """The README's cost table, counted."""
    options: dict[str, Any] = {"words": (), "size": None, "batch": 2, "cut": None}
    counted = estimate("sd15", loras=5, steps=50, **options)
    rows = ["| method | full passes | light passes | GMACs per step |", "|---|---:|---:|---:|"]
    for row in counted["methods"]:
        macs = row["macs_per_step"] / 1e9
        rows.append(f"| `{row['label']}` | {row['full']} | {row['light']} | {macs:.0f} |")
    return "\n".join(rows)


TABLES = {
    "methods": METHODS.table,
    "policies": POLICIES.table,
    "modifiers": MODIFIERS.table,
    "cost": cost_table,
    "merges": MERGES.table,
    "learned": LEARNED.table,
    "rules": RULES.table,
    "compressions": COMPRESSIONS.table,
    "tuners": TUNERS.table,
    "forms": FORMS.table,
    "optimizers": OPTIMIZERS.table,
    "scorers": SCORERS.table,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_current(name: str) -> None:
    shown = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == TABLES[name]()


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if "cmlora" in line]


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("cmlora ")])
def test_commands_parse(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    if hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    assert command.make_context(name, arguments).params


@pytest.mark.parametrize("code", blocks("python"), ids=["pipeline", "compose", "custom"])
def test_python_runs(
    code: str,
    model_folder: Path,
    lora_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the tiny model in place of the ones that are named."""
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "pipelines", tmp_path / "pipelines")
    places = {
        '"emoji"': f'"{model_folder}"',
        "path/to/model": str(model_folder),
        '"character_1"': f'"{lora_folder}/cat.safetensors"',
        '"object_1"': f'"{lora_folder}/hat.safetensors"',
        "path/to": str(lora_folder),
    }
    for shown, real in places.items():
        code = code.replace(shown, real)
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)
    assert "output" in names or "image" in names


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert targets
    for target in targets:
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_ids_in_commands_exist() -> None:
    known = library.ids("emoji")
    used = set(re.findall(r"\b(?:character|clothing|style|background|object)_\d\b", str(COMMANDS)))
    assert used <= set(known)


if __name__ == "__main__":
    text = README.read_text()
    for name, table in TABLES.items():
        section = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
        text = re.sub(
            rf"<!-- {name} -->\n.*?<!-- /{name} -->",
            lambda _, new=section: new,  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
    README.write_text(text)
