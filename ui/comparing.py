"""Grids of pictures from the same initial noise: methods, strengths, or ever more LoRAs."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from cmlora.atomic import replacing
from cmlora.errors import CmloraError
from cmlora.eval.grid import Row, grid
from cmlora.eval.variants import Variant, read
from cmlora.pipelines.models import EMBEDDED
from cmlora.strategies import METHODS
from cmlora.strategies.options import defaults
from cmlora.ui.actions import Picture, complete, paint, recipe_of
from cmlora.ui.jobs import Clock, Event, Progress, Result, Ticket, stream
from cmlora.ui.jobs import Report as Tell
from cmlora.ui.order import Order
from cmlora.ui.settings import Limits
from cmlora.ui.studio import Studio

FOLDER = "comparisons"
"""Where runs are kept inside the output folder."""


@dataclass(frozen=True)
class Sheet:
    """A grid to be filled.

    Args:
        kind: ``methods``, ``strengths`` or ``growing``.
        rows: their names, from top to bottom.
        columns: their names, from left to right.
        orders: one per cell, row by row.
    """

    kind: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    orders: tuple[tuple[Order, ...], ...]

    @property
    def steps(self) -> int:
        """Denoising steps of all cells."""
        return sum(order.steps for row in self.orders for order in row)


@dataclass(frozen=True)
class Cell:
    """A filled place of a grid.

    Args:
        row: counted from 0.
        column: counted from 0.
        picture: what is there.
        scores: by name; empty if nobody can score this model's pictures.
    """

    row: int
    column: int
    picture: Picture
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A finished grid on disk.

    Args:
        folder: with the pictures, ``results.json`` and ``grid.png``.
        grid: the grid as one picture.
    """

    folder: Path
    grid: Path


def methods_by_seeds(
    order: Order, words: Sequence[str], seeds: Sequence[int], limits: Limits
) -> Sheet:
    """One row per method, one column per seed.

    Args:
        order: everything else.
        words: methods such as ``merge`` or ``cmlora@uniform:3``.
        seeds: of the columns.
        limits: of the server.

    Raises:
        CmloraError: for unknown methods, or more cells than allowed.
    """
    variants = read([word.strip() for word in words if word.strip()])
    rows = tuple(
        tuple(replace(_variant(order, variant), seed=seed) for seed in seeds)
        for variant in variants
    )
    labels = tuple(variant.label for variant in variants)
    return _sized(Sheet("methods", labels, tuple(f"seed {s}" for s in seeds), rows), limits)


def strength_by_strength(
    order: Order,
    first: str,
    firsts: Sequence[float],
    second: str,
    seconds: Sequence[float],
    limits: Limits,
) -> Sheet:
    """One row per strength of a LoRA, one column per strength of another.

    Args:
        order: everything else; both LoRAs must be among its LoRAs.
        first: name of the rows' LoRA.
        firsts: its strengths.
        second: name of the columns' LoRA.
        seconds: its strengths.
        limits: of the server.

    Raises:
        CmloraError: if a LoRA is not selected, both are the same, or there are too many cells.
    """
    for name in (first, second):
        if name not in order.loras:
            raise CmloraError(f"LoRA {name!r} is not selected; select it first")
    if first == second:
        raise CmloraError("choose two different LoRAs")
    rows = tuple(
        tuple(replace(order, loras={**order.loras, first: a, second: b}) for b in seconds)
        for a in firsts
    )
    names = tuple(f"{first} {a:g}" for a in firsts), tuple(f"{second} {b:g}" for b in seconds)
    return _sized(Sheet("strengths", *names, rows), limits)


def growing(order: Order, words: Sequence[str], limits: Limits) -> Sheet:
    """One row per method, one column per number of LoRAs: the first, the first two, and so on.

    Args:
        order: everything else; its LoRAs are added in their order.
        words: methods such as ``merge`` or ``cmlora@uniform:3``.
        limits: of the server.

    Raises:
        CmloraError: if fewer than two LoRAs are selected, or there are too many cells.
    """
    names = list(order.loras)
    if len(names) < 2:
        raise CmloraError("select two or more LoRAs; the grid adds one per column")
    variants = read([word.strip() for word in words if word.strip()])
    rows = tuple(
        tuple(
            replace(_variant(order, variant), loras={n: order.loras[n] for n in names[:count]})
            for count in range(1, len(names) + 1)
        )
        for variant in variants
    )
    columns = tuple(f"{n} LoRA{'s' if n > 1 else ''}" for n in range(1, len(names) + 1))
    return _sized(Sheet("growing", tuple(v.label for v in variants), columns, rows), limits)


def fill(studio: Studio, sheet: Sheet, ticket: Ticket) -> Iterator[Event]:
    """Make every picture of a grid, column by column.

    Args:
        studio: the server's.
        sheet: the grid.
        ticket: stops the work; the cells that are filled by then are kept.

    Yields:
        `Progress`, a `Result` with a `Cell` per picture, and at last one with the `Run`.

    Raises:
        CmloraError: if any of the orders cannot be fulfilled; before anything is rendered.
    """
    orders = {
        (r, c): complete(studio, order)
        for r, row in enumerate(sheet.orders)
        for c, order in enumerate(row)
    }

    def work(tell: Tell) -> None:
        tell(Progress(0, sheet.steps, "loading"))
        folder = _new_folder(studio.settings.out / FOLDER)
        clock, cells = Clock(sheet.steps), []
        # column by column: the machine's moods hit all methods alike
        for c, r in ((c, r) for c in range(len(sheet.columns)) for r in range(len(sheet.rows))):
            order = orders[r, c]
            with studio.pipeline(order.model, order.loras, order.sampler, order.scopes) as pipe:
                ticket.check()
                recipe = recipe_of(pipe, order, ticket, tell, studio.settings.out)
                words = f"{sheet.rows[r]}, {sheet.columns[c]}"
                picture = paint(studio, pipe, recipe, ticket, tell, clock, words, folder=folder)
            cell = Cell(r, c, picture, _scores(order.model, picture))
            cells.append(cell)
            _save(folder, sheet, cells)
            tell(Result(cell))
        tell(Result(Run(folder, draw(folder, sheet, cells))))

    return stream(work, ticket)


def draw(folder: Path, sheet: Sheet, cells: Sequence[Cell]) -> Path:
    """Write ``grid.png``: the pictures with the names of their rows and columns, and costs."""
    placed = {(cell.row, cell.column): cell for cell in cells}
    images: dict[tuple[int, int], Image.Image] = {}
    for place, cell in placed.items():
        with Image.open(cell.picture.path) as file:
            images[place] = file.convert("RGB")
    longest = max((max(image.size) for image in images.values()), default=64)
    columns = range(len(sheet.columns))
    rows = []
    for r, name in enumerate(sheet.rows):
        line = [placed[r, c] for c in columns if (r, c) in placed]
        rows.append(Row(name, [images.get((r, c)) for c in columns], cost_notes(line)))
    tile = 3 * longest if longest <= 128 else min(longest, 320)
    prompt = cells[0].picture.recipe.prompt if cells else ""
    path = folder / "grid.png"
    with replacing(path) as file:
        grid(rows, sheet.columns, title=prompt, tile=tile).save(file, "PNG")
    return path


def cost_notes(cells: Sequence[Cell]) -> tuple[str, ...]:
    """What the pictures of a row cost on average, in a few words."""
    if not cells:
        return ()
    seconds = sorted(cell.picture.report.seconds for cell in cells)
    said = [f"{seconds[len(seconds) // 2]:.2f} s a picture"]
    counted = [c.picture.macs / c.picture.recipe.steps for c in cells if c.picture.macs is not None]
    if counted:
        said.insert(0, f"{sum(counted) / len(counted) / 1e9:.3g} GMACs per step")
    return tuple(said)


def _variant(order: Order, variant: Variant) -> Order:
    """The order with another method, and those of its options that the method has."""
    known = defaults(METHODS[variant.method].object)
    common = {key: value for key, value in order.options.items() if key in known}
    options = {**common, **variant.options}
    return replace(order, method=variant.method, cache=variant.cache, options=options, pictures=1)


def _sized(sheet: Sheet, limits: Limits) -> Sheet:
    count = len(sheet.rows) * len(sheet.columns)
    if not 1 <= count <= limits.cells:
        raise CmloraError(f"the grid has {count} pictures; between 1 and {limits.cells} are made")
    return sheet


def _scores(model: str, picture: Picture) -> dict[str, float]:
    """What the embedded world's judges say about one picture; nothing for other models."""
    if model != EMBEDDED:
        return {}
    from cmlora.eval.embedded import judge

    names = [lora.name for lora in picture.recipe.loras]
    with Image.open(picture.path) as image:
        found = judge([image.convert("RGB")], picture.recipe.prompt, names)
    return {name: float(v) for name, v in found.items() if isinstance(v, int | float)}


def _new_folder(place: Path) -> Path:
    """A folder of its own for a run, named by the time."""
    name, number = time.strftime("%Y-%m-%d %H.%M.%S"), 1
    folder = place / name
    while folder.exists():
        number += 1
        folder = place / f"{name} {number}"
    folder.mkdir(parents=True)
    return folder


def _save(folder: Path, sheet: Sheet, cells: Sequence[Cell]) -> None:
    """Write ``results.json``, whole or not at all."""
    table: dict[str, Any] = {
        "kind": sheet.kind,
        "rows": sheet.rows,
        "columns": sheet.columns,
        "complete": len(cells) == len(sheet.rows) * len(sheet.columns),
        "cells": [
            {
                "row": cell.row,
                "column": cell.column,
                "file": cell.picture.path.name,
                "seconds": cell.picture.report.seconds,
                "full_passes": sum(cell.picture.report.full.values()),
                "light_passes": sum(cell.picture.report.light.values()),
                "macs": cell.picture.macs,
                "scores": dict(cell.scores),
                "recipe": json.loads(cell.picture.recipe.to_json()),
            }
            for cell in cells
        ],
    }
    with replacing(folder / "results.json") as file:
        file.write(json.dumps(table, indent=1, ensure_ascii=False).encode())
