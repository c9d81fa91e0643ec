"""The `--plot` of commands that write LoRAs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmlora.cli.console import err
from cmlora.errors import CmloraError

if TYPE_CHECKING:
    from cmlora.lora import LoRA


def drawable(plot: Path | None, force: bool) -> None:
    """Raises `CmloraError` unless a picture can be put there, or none is asked for."""
    if plot is None:
        return
    if plot.suffix not in (".png", ".svg"):
        raise CmloraError(f"--plot {plot} should end in .png or .svg")
    if plot.exists() and not force:
        raise CmloraError(f"{plot} exists; --force replaces it")
    if not plot.absolute().parent.is_dir():
        raise CmloraError(f"the folder {plot.absolute().parent} does not exist")


def draw_merge(
    plot: Path | None,
    title: str,
    merged: "LoRA",
    sources: "Sequence[LoRA]",
    errors: Mapping[str, float] | None = None,
) -> None:
    """Write the picture of a merge, if one is asked for."""
    if plot is not None:
        from cmlora.adapters.analysis.outcome import of_merge

        of_merge(title, merged, sources, errors).save(plot)
        err.print(f"wrote {plot}")


def draw_compression(plot: Path | None, title: str, found: Mapping[str, Any]) -> None:
    """Write the picture of a compression, if one is asked for."""
    if plot is not None:
        from cmlora.adapters.analysis.outcome import of_compression

        rows = {m: (c["before"], c["after"], c["error"]) for m, c in found["modules"].items()}
        of_compression(title, rows, "rank" if "rank" in found else "bytes").save(plot)
        err.print(f"wrote {plot}")
