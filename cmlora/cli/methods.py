"""`cmlora methods`: the composition methods and cache policies there are, with their options."""

import inspect
from typing import Any

from rich.table import Table

from cmlora.cli.console import emit, out
from cmlora.cli.options import AsJson


def methods(
    as_json: AsJson = False,
) -> None:
    """List composition methods and cache policies, with their options and sources.

    Example: [bold]cmlora methods[/bold]
    """
    from cmlora.caching.modifiers import MODIFIERS
    from cmlora.caching.policy import POLICIES
    from cmlora.strategies import METHODS

    rows: dict[str, list[dict[str, Any]]] = {
        "methods": [_row(entry) for entry in METHODS.values()],
        "policies": [_row(entry) for entry in POLICIES.values()],
        "additions to policies": [_row(entry) for entry in MODIFIERS.values()],
    }
    if as_json:
        emit(rows)
        return
    for title, listed in rows.items():
        table = Table("name", "what it does", "options", "source", title=title)
        for row in listed:
            options = "\n".join(f"{key}={value}" for key, value in row["options"].items())
            table.add_row(row["name"], row["sentence"], options, row["paper"])
        out.print(table)


def _row(entry: Any) -> dict[str, Any]:
    """An entry of a registry with the keyword options its function has."""
    parameters = inspect.signature(entry.object).parameters.values()
    options = {
        p.name: p.default if isinstance(p.default, int | float | str | None) else str(p.default)
        for p in parameters
        if p.default is not inspect.Parameter.empty
    }
    return {
        "name": entry.name,
        "sentence": entry.sentence,
        "paper": entry.paper,
        "options": options,
    }
