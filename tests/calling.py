"""The command line as tests call it: what it says when all is well, and its one line when not."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from cmlora.cli.app import app


def run(*arguments: str | Path) -> str:
    """The command's stdout; it must succeed."""
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(*arguments: str | Path) -> Any:
    """What the command says to programs."""
    return json.loads(run(*arguments, "--json"))


def complaint(arguments: Sequence[str | Path]) -> str:
    """The one line in which the command says what is wrong; it must fail."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    said = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(said) == 1, result.stderr
    return said[0]
