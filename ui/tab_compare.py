"""The Compare tab: a grid from the Generate tab's settings, and a wipe between two pictures."""

from collections.abc import Iterator
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from cmlora.eval.variants import USUAL
from cmlora.ui.comparing import (
    Cell,
    Run,
    Sheet,
    cost_notes,
    fill,
    growing,
    methods_by_seeds,
    strength_by_strength,
)
from cmlora.ui.forms import FIELDS, order_of, read_selection
from cmlora.ui.jobs import Progress
from cmlora.ui.order import Order, read_numbers, read_seeds
from cmlora.ui.panels import busy, duration, macs, message, recipe_panel, stage, summary
from cmlora.ui.previews import data_uri
from cmlora.ui.rail import FOLLOWING, Rail
from cmlora.ui.studio import Studio
from cmlora.ui.tab_generate import PIPELINE, Generate, visitor
from cmlora.ui.talk import sentence

KINDS = {
    "Methods x seeds": "methods",
    "Strength x strength": "strengths",
    "Methods x number of LoRAs": "growing",
}
"""The grids there are, as the page names them."""

DEFAULT = ("naive", "merge", "switch", "composite", "cmlora@nonuniform")
"""Methods of a new comparison: the baselines and the method of the project."""

_OUTPUTS = (
    "said",
    "board",
    "cells",
    "sheet",
    "left",
    "right",
    "export",
    "go",
    "halt",
    "done",
    "queue",
)


def build(studio: Studio, rail: Rail, generate: Generate, tabs: gr.Tabs) -> gr.State:
    """Draw the tab and wire it; gives a state that changes when a run is finished."""
    limits = studio.settings.limits
    gr.HTML(
        '<p class="note">Prompt, LoRAs, size and sampler are those of the Generate tab; what is '
        "compared starts from the same noise.</p>"
    )
    with gr.Row(elem_classes="workspace"):
        with gr.Column(scale=5, min_width=300):
            kind = gr.Radio(list(KINDS), value="Methods x seeds", label="Grid", elem_id="grid-kind")
            methods = gr.Dropdown(
                list(USUAL),
                value=list(DEFAULT),
                multiselect=True,
                allow_custom_value=True,
                label="Methods",
                info="A method, or method@cache such as cmlora@uniform:3.",
                elem_id="grid-methods",
            )
            seeds = gr.Textbox("0-1", label="Seeds", info="Such as 0-3 or 1,5.", elem_id="seeds")
            with gr.Row(visible=False) as pair:
                first = gr.Dropdown([], label="Rows: LoRA", elem_id="first-lora")
                firsts = gr.Textbox("0.5, 1, 1.5", label="Its strengths", elem_id="firsts")
                second = gr.Dropdown([], label="Columns: LoRA", elem_id="second-lora")
                seconds = gr.Textbox("0.5, 1, 1.5", label="Its strengths", elem_id="seconds")
        with gr.Column(scale=6, min_width=300):
            said = gr.HTML(message(f"At most {limits.cells} pictures."), elem_id="grid-said")
            queue = gr.HTML("", elem_id="grid-queue")
            with gr.Row():
                go = gr.Button(
                    "Compare", variant="primary", size="lg", min_width=110, elem_id="compare"
                )
                halt = gr.Button(
                    "Stop", size="lg", interactive=False, min_width=80, elem_id="compare-stop"
                )
                export = gr.DownloadButton(
                    "Download grid",
                    size="lg",
                    interactive=False,
                    min_width=110,
                    elem_id="export-grid",
                )
    board = gr.HTML(elem_id="board", elem_classes="wide")
    cells = gr.State([])
    sheet_state, asked = gr.State(None), gr.State(0)
    done = gr.State("")
    gr.HTML("<h2>Wipe between two pictures</h2>")
    with gr.Row():
        left = gr.Dropdown([], label="Left", elem_id="wipe-left")
        right = gr.Dropdown([], label="Right", elem_id="wipe-right")
    with gr.Row(elem_classes="workspace"):
        with gr.Column(scale=5, min_width=300):
            curtain = gr.HTML(stage("", kind="idle"), elem_id="wipe", visible=False)
        with gr.Column(scale=6, min_width=300):
            recipe = gr.HTML("", elem_id="wipe-recipe")

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    outputs = [said, board, cells, sheet_state, left, right, export, go, halt, done, queue]
    assert len(outputs) == len(_OUTPUTS)

    def on_compare(
        which: str,
        words: list[str],
        text: str,
        one: str,
        ones: str,
        other: str,
        others: str,
        number: int,
        request: gr.Request,
        *values: Any,
    ) -> Iterator[list[Any]]:
        on, off = gr.Button(interactive=True), gr.Button(interactive=False)
        found: list[Cell] = []
        try:
            order = order_of(*values)
            sheet = _sheet(studio, which, order, words, text, (one, ones, other, others))
            with studio.tickets.take(visitor(request), number) as ticket:
                yield _changed(
                    board=grid_html(sheet, found), cells=[], sheet=sheet, go=off, halt=on
                )
                for event in fill(studio, sheet, ticket):
                    if isinstance(event, Progress):
                        bar = compact(busy(replace(event, preview="")))
                        yield _changed(said=bar, go=off, halt=on, queue="")
                    elif isinstance(event.value, Cell):
                        found.append(event.value)
                        yield _changed(board=grid_html(sheet, found))
                    else:
                        yield _finished(sheet, found, event.value, on, off)
        except Exception as error:
            yield _changed(said=message(sentence(error), "error"), go=on, halt=off, queue="")

    def on_wipe(a: str, b: str, sheet: Sheet | None, found: list[Cell]) -> tuple[Any, str]:
        if sheet is None or not found:
            return gr.HTML(visible=False), ""
        named = {cell_name(sheet, cell): cell for cell in found}
        if a not in named or b not in named:
            return gr.HTML(visible=False), ""
        panel = recipe_panel(named[b].picture.recipe, summary(named[b].picture))
        return gr.HTML(wipe_html(a, named[a], b, named[b]), visible=True), panel

    def on_kind(which: str, text: str) -> list[Any]:
        names = list(read_selection(text))
        strengths, counting = KINDS[which] == "strengths", KINDS[which] == "growing"
        return [
            gr.Dropdown(visible=not strengths),
            gr.Textbox(visible=not (strengths or counting)),
            gr.Row(visible=strengths),
            gr.Dropdown(choices=names, value=names[0] if names else None),
            gr.Dropdown(choices=names, value=names[1] if len(names) > 1 else None),
        ]

    def on_stop(request: gr.Request) -> tuple[str, Any, Any]:
        studio.tickets.stop(visitor(request))
        on, off = gr.Button(interactive=True), gr.Button(interactive=False)
        return message("Stopped; the pictures so far are kept."), on, off

    def on_press(request: gr.Request) -> tuple[int, str, Any, Any]:
        number = studio.tickets.ask(visitor(request))
        on, off = gr.Button(interactive=True), gr.Button(interactive=False)
        return number, message("Waiting for its turn."), off, on

    begin = go.click(on_press, None, [asked, said, go, halt], queue=False, **quiet)
    begin.then(
        on_compare,
        [kind, methods, seeds, first, firsts, second, seconds, asked, *generate.inputs],
        outputs,
        concurrency_id=PIPELINE,
        concurrency_limit=1,
        api_visibility="private",
        show_progress="minimal",
        show_progress_on=queue,
    )
    halt.click(on_stop, None, [said, go, halt], queue=False, **quiet)
    for side in (left, right):
        side.change(on_wipe, [left, right, sheet_state, cells], [curtain, recipe], **quiet)
    shape = [methods, seeds, pair, first, second]
    kind.change(on_kind, [kind, rail.loras], shape, **quiet)
    rail.loras.change(on_kind, [kind, rail.loras], shape, **FOLLOWING)

    def on_send(*values: Any) -> list[Any]:
        given = dict(zip(FIELDS, values, strict=True))
        wanted = given["method"] + (f"@{given['cache']}" if given["cache"] else "")
        if wanted == "cmlora":
            wanted = "cmlora@nonuniform"
        rows = list(dict.fromkeys([*DEFAULT, wanted]))
        seed = int(given["seed"] or 0)
        return [gr.Tabs(selected="compare"), "Methods x seeds", rows, f"{seed}-{seed + 1}"]

    generate.to_compare.click(on_send, generate.inputs, [tabs, kind, methods, seeds], **quiet)
    return done


def _changed(**values: Any) -> list[Any]:
    """The tab's outputs: what is named changes, everything else stays."""
    return [values.get(name, gr.skip()) for name in _OUTPUTS]


def _finished(sheet: Sheet, found: list[Cell], run: Run, on: Any, off: Any) -> list[Any]:
    names = [cell_name(sheet, cell) for cell in found]
    return _changed(
        said=message(f"{len(found)} pictures in {run.folder.name}"),
        cells=found,
        left=gr.Dropdown(choices=names, value=names[0]),
        right=gr.Dropdown(choices=names, value=names[-1]),
        export=gr.DownloadButton(value=str(run.grid), interactive=True),
        go=on,
        halt=off,
        done=run.folder.name,
        queue="",
    )


def _sheet(
    studio: Studio,
    which: str,
    order: Order,
    words: list[str],
    seeds: str,
    pair: tuple[str, str, str, str],
) -> Sheet:
    limits = studio.settings.limits
    if KINDS.get(which) == "strengths":
        one, ones, other, others = pair
        return strength_by_strength(
            order,
            one or "",
            read_numbers("strengths", ones),
            other or "",
            read_numbers("strengths", others),
            limits,
        )
    if KINDS.get(which) == "growing":
        return growing(order, words, limits)
    return methods_by_seeds(order, words, read_seeds(seeds, limits), limits)


def cell_name(sheet: Sheet, cell: Cell) -> str:
    """What a cell is called in lists."""
    return f"{sheet.rows[cell.row]} · {sheet.columns[cell.column]}"


def grid_html(sheet: Sheet, cells: list[Cell]) -> str:
    """The grid with what is filled so far; its size does not depend on that.

    Every cell knows its row and column, so that a wide screen may show the longer side across.
    """
    placed = {(cell.row, cell.column): cell for cell in cells}
    parts = [
        f'<div class="head short" style="--r:0;--c:{c + 1}">{escape(name)}</div>'
        for c, name in enumerate(sheet.columns)
    ]
    for r, name in enumerate(sheet.rows):
        line = [placed[r, c] for c in range(len(sheet.columns)) if (r, c) in placed]
        notes = "".join(f"<small>{escape(note)}</small>" for note in cost_notes(line))
        parts.append(
            f'<div class="head" style="--r:{r + 1};--c:0"><b>{escape(name)}</b>{notes}</div>'
        )
        for c, column in enumerate(sheet.columns):
            tile = _tile(placed.get((r, c)), f"{name}, {column}")
            parts.append(f'<figure style="--r:{r + 1};--c:{c + 1}">{tile}</figure>')
    turned = "turned" if len(sheet.rows) > len(sheet.columns) else ""
    sides = f"--rows:{len(sheet.rows)};--columns:{len(sheet.columns)}"
    return f'<div class="cells {turned}" style="{sides}">{"".join(parts)}</div>'


def _tile(cell: Cell | None, name: str) -> str:
    if cell is None:
        return '<div class="pic"></div><figcaption>&nbsp;</figcaption>'
    picture = cell.picture
    scores = [f"{_SHORT.get(k, k)} {v:.2g}" for k, v in cell.scores.items()]
    cost = " · ".join(
        filter(None, (duration(picture.report.seconds), macs(picture.macs) if picture.macs else ""))
    )
    with Image.open(picture.path) as image:
        source = data_uri(image, 320)
    return (
        f'<div class="pic"><img src="{source}" alt="{escape(name, quote=True)}"></div>'
        f"<figcaption>{escape(cost)}<br>{escape(' · '.join(scores))}</figcaption>"
    )


_SHORT = {"instances": "found", "classes": "class", "clip_score": "CLIP", "fidelity": "fidelity"}


def wipe_html(a: str, one: Cell, b: str, other: Cell) -> str:
    """Two pictures on top of each other, with a slider that says how much of each is seen."""
    with Image.open(one.picture.path) as image:
        under = data_uri(image, 1024)
    with Image.open(other.picture.path) as image:
        over = data_uri(image, 1024)
    return (
        f'<div class="wipe"><div class="pair"><img src="{under}" alt="{escape(a, quote=True)}">'
        f'<img class="over" src="{over}" alt="{escape(b, quote=True)}"><div class="edge"></div>'
        '</div><input type="range" min="0" max="100" value="50" aria-label="Wipe between the two '
        f'pictures"><div class="names"><span>{escape(a)}</span><span>{escape(b)}</span></div></div>'
    )


def compact(html: str) -> str:
    """The stage's bar and words without its frame."""
    start, end = html.index('<div class="frame">'), html.index('<div class="bar"')
    return html[:start] + html[end:]
