"""The Zoo's last sections: a picture's composition as one file, and many LoRAs in one file."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from cmlora.ui import baking, packs
from cmlora.ui.forms import read_selection
from cmlora.ui.panels import message
from cmlora.ui.rail import FOLLOWING
from cmlora.ui.studio import Studio
from cmlora.ui.talk import sentence
from cmlora.ui.writing import Made
from cmlora.ui.zoo_results import QUIET, RUNNING, Bench, needs_html

_BAKES = (
    "Turns what a picture was composed of into the nearest single LoRA, and says how near it is"
)
_PACKS = "Stores the selected LoRAs as a mean, a basis and coefficients: smaller for similar ones"


@dataclass(frozen=True)
class Packing:
    """The sections' components."""

    picture: gr.File
    fit: gr.Dropdown
    steps: gr.Number
    rank: gr.Number
    bake_note: gr.HTML
    bake: gr.Button
    baked: gr.HTML
    size: gr.Number
    granularity: gr.Dropdown
    pack_note: gr.HTML
    pack: gr.Button
    which: gr.Dropdown
    names: gr.Dropdown
    unpack: gr.Button
    packed: gr.HTML


def draw(studio: Studio) -> Packing:
    """Draw both sections."""
    gr.HTML("<h2>Bake a picture's composition into one LoRA</h2>")
    bake_note = gr.HTML(needs_html(_BAKES, "drop a picture made by cmlora"))
    with gr.Row(elem_classes="act"):
        picture = gr.File(label="Picture", file_types=[".png"], height=110, elem_id="bake-picture")
        with gr.Column(min_width=280):
            with gr.Row():
                fit = gr.Dropdown(list(baking.FIT), value="factors", label="What is fitted")
                steps = gr.Number(
                    60, label="Steps", precision=0, min_width=80, elem_id="bake-steps"
                )
                rank = gr.Number(None, label="Largest rank (0: any)", precision=0, min_width=80)
            bake = gr.Button("Bake", interactive=False, elem_id="bake", min_width=120)
    baked = gr.HTML(elem_id="baked")
    gr.HTML("<h2>Pack many into one file</h2>")
    pack_note = gr.HTML(needs_html(_PACKS, packs.missing(0)))
    with gr.Row(elem_classes="act"):
        size = gr.Number(1, label="Basis vectors", precision=0, elem_id="pack-size")
        granularity = gr.Dropdown(
            list(packs.GRANULARITIES), value="module", label="What shares a basis"
        )
        pack = gr.Button("Pack", interactive=False, elem_id="pack", scale=0, min_width=120)
    with gr.Row(elem_classes="act"):
        which = gr.Dropdown(
            list(packs.shelf(studio).listing()), value=None, label="Pack", elem_id="packs"
        )
        names = gr.Dropdown([], multiselect=True, label="LoRAs in it (all if empty)")
        unpack = gr.Button("Unpack", interactive=False, elem_id="unpack", scale=0, min_width=120)
    packed = gr.HTML(elem_id="packed")
    return Packing(
        picture,
        fit,
        steps,
        rank,
        bake_note,
        bake,
        baked,
        size,
        granularity,
        pack_note,
        pack,
        which,
        names,
        unpack,
        packed,
    )


def wire(bench: Bench, parts: Packing) -> None:
    """Connect both sections."""
    studio, rail = bench.studio, bench.rail

    def on_picture(path: str | None) -> list[Any]:
        needs = "" if path else "drop a picture made by cmlora"
        return [needs_html(_BAKES, needs), gr.Button(interactive=not needs)]

    def on_bake(
        model: str,
        text: str,
        path: str | None,
        fit: str,
        steps: Any,
        rank: Any,
        request: gr.Request,
    ) -> Iterator[list[Any]]:
        yield from bench.follow(
            lambda ticket: baking.bake(
                studio, path or "", model, ticket, fit=fit, steps=steps, rank=rank
            ),
            model,
            text,
            request,
        )

    def on_selection(text: str) -> list[Any]:
        needs = packs.missing(len(read_selection(text)))
        return [needs_html(_PACKS, needs), gr.Button(interactive=not needs)]

    def on_pack(
        model: str, text: str, size: Any, shared: str, request: gr.Request
    ) -> Iterator[list[Any]]:
        made: list[Made] = []

        def start(_: Any) -> Made:
            made.append(
                packs.pack(studio, model, read_selection(text), size=size, granularity=shared)
            )
            return made[0]

        for outputs in bench.follow(start, model, text, request):
            known = list(packs.shelf(studio).listing())
            value = made[0].name if made else None
            yield [*outputs, gr.Dropdown(choices=known, value=value) if made else gr.skip()]

    def on_which(name: str | None) -> list[Any]:
        try:
            found = list(packs.names_in(studio, name)) if name else []
        except Exception as error:
            return [gr.Dropdown(choices=[]), _off(), message(sentence(error), "error")]
        return [gr.Dropdown(choices=found, value=[]), gr.Button(interactive=bool(found)), gr.skip()]

    def on_unpack(
        model: str, text: str, name: str | None, wanted: list[str] | None, request: gr.Request
    ) -> Iterator[list[Any]]:
        yield from bench.follow(
            lambda _: packs.unpack(studio, name or "", wanted or ()), model, text, request
        )

    parts.picture.change(on_picture, parts.picture, [parts.bake_note, parts.bake], **QUIET)
    parts.bake.click(
        on_bake,
        [rail.model, rail.loras, parts.picture, parts.fit, parts.steps, parts.rank],
        [parts.baked, *bench.results],
        show_progress_on=parts.baked,
        **RUNNING,
    )
    rail.loras.change(on_selection, rail.loras, [parts.pack_note, parts.pack], **FOLLOWING)
    parts.pack.click(
        on_pack,
        [rail.model, rail.loras, parts.size, parts.granularity],
        [parts.packed, *bench.results, parts.which],
        show_progress_on=parts.packed,
        **RUNNING,
    )
    parts.which.change(on_which, parts.which, [parts.names, parts.unpack, parts.packed], **QUIET)
    parts.unpack.click(
        on_unpack,
        [rail.model, rail.loras, parts.which, parts.names],
        [parts.packed, *bench.results],
        show_progress_on=parts.packed,
        **RUNNING,
    )


def _off() -> Any:
    return gr.Button(interactive=False)
