"""The same actions for programs: plain values in, JSON and files out, under names that stay."""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData
from gradio.events import api

from cmlora.errors import CmloraError
from cmlora.ui.actions import Picture, generate, replay
from cmlora.ui.cards import cards
from cmlora.ui.comparing import Cell, Run, fill, methods_by_seeds
from cmlora.ui.estimates import estimate
from cmlora.ui.jobs import Event, Result
from cmlora.ui.order import Order, read_seeds
from cmlora.ui.shelf import unknown
from cmlora.ui.studio import Studio
from cmlora.ui.tab_generate import PIPELINE, visitor
from cmlora.ui.talk import sentence
from cmlora.ui.workbench import inspect


def build(studio: Studio) -> None:
    """Declare the endpoints; must be called inside the page."""

    def models() -> list[str]:
        """Names of the models."""
        return studio.model_names()

    def loras(model: str) -> list[dict[str, Any]]:
        """The LoRAs of a model: name, family, rank, trigger words, and what is wrong with it."""
        with _sentences():
            studio.model_place(model)
            return [
                {
                    "name": card.name,
                    "family": card.family,
                    "rank": card.rank,
                    "triggers": list(card.triggers),
                    "problem": card.problem,
                }
                for card in cards(studio, model)
            ]

    def inspected(name: str, model: str) -> dict[str, str]:
        """What a LoRA file is."""
        with _sentences():
            return inspect(studio, model, name)

    def cost(request: dict[str, Any]) -> dict[str, Any]:
        """What a request would take, without rendering it."""
        with _sentences():
            return dict(vars(estimate(studio, order(request))))

    def pictures(request: dict[str, Any], visit: gr.Request) -> list[dict[str, Any]]:
        """Make the pictures of a request: its keys are the fields of `cmlora.ui.order.Order`."""
        with _sentences(), studio.tickets.take(visitor(visit)) as ticket:
            return [_picture(p) for p in _results(generate(studio, order(request), ticket))]

    def comparison(
        request: dict[str, Any], methods: list[str], seeds: str, visit: gr.Request
    ) -> dict[str, Any]:
        """Methods by seeds: every picture with its row and column, and the grid."""
        limits = studio.settings.limits
        with _sentences(), studio.tickets.take(visitor(visit)) as ticket:
            sheet = methods_by_seeds(order(request), methods, read_seeds(seeds, limits), limits)
            found: list[Any] = _results(fill(studio, sheet, ticket))
        cells: list[Cell] = [value for value in found if isinstance(value, Cell)]
        run: Run = found[-1]
        rows = [
            {
                "row": sheet.rows[cell.row],
                "column": sheet.columns[cell.column],
                "scores": dict(cell.scores),
                **_picture(cell.picture),
            }
            for cell in cells
        ]
        return {"run": run.folder.name, "grid": _file(run.grid), "cells": rows}

    def stop(visit: gr.Request) -> int:
        """Stop what this client has running; says how much that was."""
        return studio.tickets.stop(visitor(visit))

    for function, name in (
        (models, "models"),
        (loras, "loras"),
        (inspected, "inspect"),
        (cost, "cost"),
    ):
        api(function, api_name=name, concurrency_limit=4, concurrency_id="quick")
    api(pictures, api_name="generate", concurrency_limit=1, concurrency_id=PIPELINE)
    api(comparison, api_name="compare", concurrency_limit=1, concurrency_id=PIPELINE)
    api(stop, api_name="stop", queue=False)

    def again(path: str, model: str, visit: gr.Request) -> tuple[str, str]:
        with _sentences(), studio.tickets.take(visitor(visit)) as ticket:
            (picture,) = _results(replay(studio, path, model, ticket))
        return str(picture.path), picture.recipe.to_json()

    # a file can only be sent to a component that knows files
    sent = gr.File(visible=False, file_types=[".png"])
    model, back, text = gr.Textbox(visible=False), gr.File(visible=False), gr.Textbox(visible=False)
    gr.Button(visible=False).click(
        again,
        [sent, model],
        [back, text],
        api_name="replay",
        api_description="Make the picture in a PNG again; gives the file and its recipe.",
        concurrency_limit=1,
        concurrency_id=PIPELINE,
    )


def order(request: dict[str, Any]) -> Order:
    """An order from a request's keys.

    Raises:
        CmloraError: for a key that is not a field of `Order`, or no model.
    """
    known = [field.name for field in fields(Order)]
    if not isinstance(request, dict):
        raise CmloraError("the request is not a table")
    for key in request:
        if key not in known:
            raise CmloraError(unknown("request key", key, known))
    if "model" not in request:
        raise CmloraError("the request names no model")
    return Order(**request)


class _sentences:
    """Turns whatever goes wrong into a sentence for the client."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            raise gr.Error(sentence(error), print_exception=False) from None


def _results(events: Iterator[Event]) -> list[Any]:
    return [event.value for event in events if isinstance(event, Result)]


def _picture(picture: Picture) -> dict[str, Any]:
    report = picture.report
    return {
        "file": _file(picture.path),
        "recipe": json.loads(picture.recipe.to_json()),
        "seconds": report.seconds,
        "full_passes": sum(report.full.values()),
        "light_passes": sum(report.light.values()),
        "macs": picture.macs,
    }


def _file(path: Path) -> dict[str, Any]:
    return FileData(path=str(path), orig_name=path.name, mime_type="image/png").model_dump()
