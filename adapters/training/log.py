"""What happened at each step, as CSV, as a plot, and for TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmlora.atomic import replacing
from cmlora.errors import CmloraError

COLUMNS = ("step", "epoch", "loss", "rate", "gradient", "seconds")


class Log:
    """Rows of a training, each on disk before the next step begins.

    Args:
        folder: for ``log.csv``, ``loss.svg`` and ``tensorboard/``.
        start: step to continue at; rows from there on are of steps that will be done again.
        tensorboard: also write events.

    Raises:
        CmloraError: if TensorBoard is asked for and not installed, or nothing can be written.
    """

    def __init__(self, folder: Path, start: int = 0, tensorboard: bool = False) -> None:
        self.path = folder / "log.csv"
        rows = _read(self.path)[:start]
        self.losses = [float(row["loss"]) for row in rows]
        self._writer = _writer(folder / "tensorboard", start) if tensorboard else None
        with replacing(self.path) as file:
            file.write(_csv([COLUMNS, *([row[c] for c in COLUMNS] for row in rows)]).encode())
        self._file = self.path.open("a", encoding="utf-8", newline="")

    def add(self, **row: Any) -> None:
        """One step's numbers."""
        self.losses.append(float(row["loss"]))
        self._file.write(_csv([[row[c] for c in COLUMNS]]))
        self._file.flush()
        if self._writer is not None:
            for column in COLUMNS[2:5]:
                self._writer.add_scalar(column, float(row[column]), row["step"])

    def plot(self) -> None:
        """Writes ``loss.svg``."""
        with replacing(self.path.with_name("loss.svg")) as file:
            file.write(curve(self.losses).encode())

    def close(self) -> None:
        """Ends the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def curve(losses: Sequence[float], width: int = 640, height: int = 320) -> str:
    """Losses by step as an SVG: the values, and their running mean over a twentieth of them."""
    shown = losses[:: max(1, len(losses) // 2000)] or [0.0]
    window = max(1, len(shown) // 20)
    smooth, total = [], 0.0
    for index, loss in enumerate(shown):
        total += loss - (shown[index - window] if index >= window else 0.0)
        smooth.append(total / min(index + 1, window))
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0

    def line(values: Sequence[float], style: str) -> str:
        points = " ".join(
            f"{50 + (width - 60) * i / max(1, len(values) - 1):.1f},"
            f"{10 + (height - 40) * (high - v) / span:.1f}"
            for i, v in enumerate(values)
        )
        return f'<polyline points="{points}" fill="none" {style}/>'

    words = [
        f'<text x="45" y="{y}" text-anchor="end">{value:.4g}</text>'
        for y, value in ((16, high), (height - 28, low))
    ]
    words += [
        f'<text x="{x}" y="{height - 10}" text-anchor="{anchor}">{text}</text>'
        for x, anchor, text in ((50, "start", "step 1"), (width - 10, "end", len(losses)))
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="11">',
            '<rect width="100%" height="100%" fill="white"/>',
            line(shown, 'stroke="#bbccdd"'),
            line(smooth, 'stroke="#205080" stroke-width="2"'),
            *words,
            "</svg>",
        ]
    )


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _read(path: Path) -> list[dict[str, str]]:
    """The whole rows of a log; an interrupted last one is left out."""
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    rows = list(csv.DictReader(io.StringIO(whole)))
    return [row for row in rows if all(row.get(column) for column in COLUMNS)]


def _writer(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise CmloraError(
            "train: tensorboard is not installed; pip install tensorboard, or use the CSV log"
        ) from None
    return SummaryWriter(str(folder), purge_step=start + 1)
