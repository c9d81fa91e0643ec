"""`python -m cmlora.ui`: the same as `cmlora ui`."""

import sys

import typer

from cmlora.errors import CmloraError
from cmlora.ui.command import ui


def main() -> None:
    """Run the command; a mistake is one line and exit code 2."""
    try:
        typer.run(ui)
    except CmloraError as mistake:
        typer.echo(f"error: {' '.join(str(mistake).split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
