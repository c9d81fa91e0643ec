"""What `cmlora merge` says of a merge, whether it was computed or learnt."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Column, Table

from cmlora.cli.console import out

if TYPE_CHECKING:
    from cmlora.adapters.merging.result import Report


def tell(report: "Report", output: Path, title: str | None = None, caption: str = "") -> None:
    """Print a report: distances by block, notes, warnings, and the file that was written."""
    table = Table(
        "block",
        Column("distance from the weighted sum", justify="right"),
        title=title,
        caption=caption or None,
    )
    for block, error in report.errors.items():
        table.add_row(block, f"{error:.2%}")
    table.add_row("all", f"{report.error:.2%}")
    out.print(table)
    for key, words in report.remarks.items():
        out.print(f"{key} {words}", highlight=False)
    for remark in report.warnings:
        out.print(f"note: {remark}")
    size = f"{output.stat().st_size / 2**20:.1f} MB"
    out.print(f"{output}: rank {report.rank}, {size}, {report.seconds:.1f} s", soft_wrap=True)
