"""Pictures of a run for a page: every method of a set side by side, with its recipe."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cmlora.errors import CmloraError
from cmlora.eval.manifest import set_id
from cmlora.eval.report.summary import Summary
from cmlora.eval.study import Record
from cmlora.recipe import from_png

TILE = 256
"""Larger pictures are made smaller for the page, to this many pixels."""


@dataclass(frozen=True)
class Shelf:
    """All methods' pictures of one set and seed.

    Args:
        ids: the set.
        seed: of the noise.
        records: one per method that has it.
    """

    ids: tuple[str, ...]
    seed: int
    records: tuple[Record, ...]


def shelves(summary: Summary, per_size: int) -> list[Shelf]:
    """So many sets of every N, spread evenly, those that most methods have first.

    Args:
        summary: the numbers.
        per_size: sets per N; the first seed of each is shown.
    """
    found = []
    for n in summary.sizes:
        by_place: dict[tuple[tuple[str, ...], int], list[Record]] = {}
        for record in summary.records:
            if record.n == n:
                by_place.setdefault((record.ids, record.seed), []).append(record)
        most = max(map(len, by_place.values()))
        seeds: dict[tuple[str, ...], int] = {}
        for (ids, seed), records in sorted(by_place.items()):
            if len(records) == most:
                seeds.setdefault(ids, seed)
        sets = sorted(seeds)
        count = min(per_size, len(sets))
        chosen = [sets[round(i * (len(sets) - 1) / max(1, count - 1))] for i in range(count)]
        for ids in dict.fromkeys(chosen):
            by_label = {record.label: record for record in by_place[ids, seeds[ids]]}
            row = tuple(by_label[label] for label in summary.labels if label in by_label)
            found.append(Shelf(ids, seeds[ids], row))
    return found


def data_uri(path: Path) -> str:
    """A picture as text that a page can hold; shrunk if it is large."""
    try:
        with Image.open(path) as file:
            return uri_of(file.convert("RGB"))
    except OSError as error:
        raise CmloraError(f"cannot read the picture {path}: {error}") from None


def uri_of(picture: Image.Image) -> str:
    """The same of a picture that is not in a file."""
    buffer = io.BytesIO()
    if max(picture.size) <= TILE:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def recipe_text(path: Path) -> str:
    """A picture's recipe, indented."""
    return json.dumps(json.loads(from_png(path).to_json()), indent=1, sort_keys=True)


def contact_sheet(folder: Path, rows: Sequence[Shelf], tile: int = 128) -> Image.Image | None:
    """The shelves as one picture with labels: a row per set, a column per method.

    Args:
        folder: of the run.
        rows: the shelves; those with other methods than the first are left out.
        tile: side of a picture in pixels.
    """
    from cmlora.eval.grid import Row, grid

    if not rows:
        return None
    labels = [record.label for record in rows[0].records]
    lines = []
    for shelf in rows:
        if [record.label for record in shelf.records] == labels:
            pictures = []
            for record in shelf.records:
                with Image.open(folder / record.image) as file:
                    pictures.append(file.convert("RGB"))
            notes = [*shelf.ids, f"seed {shelf.seed}"]
            lines.append(Row(f"N = {len(shelf.ids)}", pictures, notes))
    return grid(lines, labels, title="one set per row", tile=tile)


def shelf_name(shelf: Shelf) -> str:
    """Set and seed, for a heading."""
    return f"{set_id(shelf.ids).replace('+', ' + ')}, seed {shelf.seed}"
