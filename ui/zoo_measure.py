"""The Zoo's sections that ask the model: calibration data, and whether two LoRAs can become one."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import gradio as gr

from cmlora.ui import calibrations, charts, pairs
from cmlora.ui.forms import read_selection
from cmlora.ui.jobs import Progress
from cmlora.ui.pairs import Alignment
from cmlora.ui.panels import busy, message
from cmlora.ui.rail import FOLLOWING
from cmlora.ui.studio import Studio
from cmlora.ui.tab_compare import compact
from cmlora.ui.tab_generate import visitor
from cmlora.ui.talk import sentence
from cmlora.ui.zoo_results import QUIET, RUNNING, Bench, made_html, needs_html

_MEASURES = (
    "Measures what the model's layers see, alone and with each selected LoRA; merges that need it "
    "and safe strengths read it"
)
_COMPARES = "Says whether the two selected LoRAs can become one, block by block, from their files"

_HOW = {
    "none": "as they are",
    "permute": "rank units reordered",
    "procrustes": "rank units rotated",
    "canon": "canonical factors",
}


@dataclass(frozen=True)
class Measuring:
    """The sections' components."""

    steps: gr.Number
    prompt: gr.Textbox
    measure: gr.Button
    calib_note: gr.HTML
    calib: gr.Dropdown
    strengths: gr.Button
    measured: gr.HTML
    hill: gr.Checkbox
    align: gr.Button
    align_note: gr.HTML
    aligned: gr.HTML


def draw(studio: Studio) -> Measuring:
    """Draw both sections."""
    gr.HTML("<h2>Calibration data</h2>")
    calib_note = gr.HTML(needs_html(_MEASURES, "select the LoRAs to measure"))
    with gr.Row(elem_classes="act"):
        steps = gr.Number(calibrations.STEPS, label="Steps of a run", precision=0)
        prompt = gr.Textbox(label="Prompt (trigger words if empty)")
        measure = gr.Button(
            "Measure", interactive=False, elem_id="calibrate", scale=0, min_width=120
        )
    with gr.Row(elem_classes="act"):
        calib = gr.Dropdown(
            list(calibrations.shelf(studio).listing()),
            value=None,
            label="What has been measured",
            elem_id="calibrations",
        )
        strengths = gr.Button(
            "Safe strengths", interactive=False, elem_id="strengths", scale=0, min_width=160
        )
    measured = gr.HTML(elem_id="calibrated")
    gr.HTML("<h2>Can two become one?</h2>")
    align_note = gr.HTML(needs_html(_COMPARES, pairs.missing(0)))
    with gr.Row(elem_classes="act"):
        hill = gr.Checkbox(label="Measure the loss on the way between them, on the model")
        align = gr.Button("Compare", interactive=False, elem_id="align", scale=0, min_width=120)
    aligned = gr.HTML(elem_id="aligned")
    return Measuring(
        steps,
        prompt,
        measure,
        calib_note,
        calib,
        strengths,
        measured,
        hill,
        align,
        align_note,
        aligned,
    )


def wire(bench: Bench, parts: Measuring, merging: gr.Dropdown) -> None:
    """Connect both sections.

    Args:
        bench: the page.
        parts: the components.
        merging: the merge section's list of calibrations, which new ones join.
    """
    studio, rail = bench.studio, bench.rail

    def on_change(text: str, calib: str | None) -> list[Any]:
        count = len(read_selection(text))
        asks = "" if count else "select the LoRAs to measure"
        problem = pairs.missing(count)
        return [
            needs_html(_MEASURES, asks),
            gr.Button(interactive=not asks),
            gr.Button(interactive=bool(count and calib)),
            needs_html(_COMPARES, problem),
            gr.Button(interactive=not problem),
        ]

    def on_measure(
        model: str, text: str, steps: Any, prompt: str, request: gr.Request
    ) -> Iterator[list[Any]]:
        try:
            with studio.tickets.take(visitor(request)) as ticket:
                chosen = read_selection(text)
                events = calibrations.calibrate(
                    studio, model, chosen, ticket, steps=steps, prompt=(prompt or "").strip()
                )
                for event in events:
                    if isinstance(event, Progress):
                        yield [compact(busy(replace(event, preview=""))), gr.skip(), gr.skip()]
                        continue
                    known = list(calibrations.shelf(studio).listing())
                    here = gr.Dropdown(choices=known, value=event.value.name)
                    there = gr.Dropdown(choices=known, value=event.value.name)
                    yield [made_html(event.value, studio), here, there]
        except Exception as error:
            yield [message(sentence(error), "error"), gr.skip(), gr.skip()]

    def on_strengths(model: str, text: str, calib: str | None) -> str:
        try:
            chosen = read_selection(text)
            return strengths_html(calibrations.safe_strengths(studio, model, chosen, calib or ""))
        except Exception as error:
            return message(sentence(error), "error")

    def on_align(model: str, text: str, hill: bool, request: gr.Request) -> Iterator[str]:
        try:
            with studio.tickets.take(visitor(request)) as ticket:
                chosen = read_selection(text)
                for event in pairs.align(studio, model, chosen, ticket, on_model=bool(hill)):
                    if isinstance(event, Progress):
                        yield compact(busy(replace(event, preview="")))
                    else:
                        yield alignment_html(event.value)
        except Exception as error:
            yield message(sentence(error), "error")

    gr.on(
        [rail.loras.change, parts.calib.change],
        on_change,
        [rail.loras, parts.calib],
        [parts.calib_note, parts.measure, parts.strengths, parts.align_note, parts.align],
        **FOLLOWING,
    )
    parts.measure.click(
        on_measure,
        [rail.model, rail.loras, parts.steps, parts.prompt],
        [parts.measured, parts.calib, merging],
        show_progress_on=parts.measured,
        **RUNNING,
    )
    parts.strengths.click(
        on_strengths, [rail.model, rail.loras, parts.calib], parts.measured, **QUIET
    )
    parts.align.click(
        on_align,
        [rail.model, rail.loras, parts.hill],
        parts.aligned,
        show_progress_on=parts.aligned,
        **RUNNING,
    )


def strengths_html(found: Any) -> str:
    """How strong each LoRA may be, and all of them together."""
    rows = "".join(
        f"<tr><td>{escape(row.name)}</td>"
        f'<td class="n">{f"{row.safest:.2f}" if math.isfinite(row.safest) else "any"}</td>'
        f"<td>{escape(row.where)}</td></tr>"
        for row in found
    )
    return (
        '<div class="wide"><table class="plain"><thead><tr><th>LoRA</th>'
        '<th class="n">safe strength</th><th>first layer to go</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def alignment_html(found: Alignment) -> str:
    """Likeness by block, what merging factors apart would lose, and the hill between."""
    likeness = found.likeness
    rows = "".join(
        f'<tr><td>{escape(block)}</td><td class="n">{row.cosine:+.3f}</td>'
        f'<td class="n">{row.score:+.3f}</td></tr>'
        for block, row in likeness.blocks.items()
    )
    total = (
        f'<tr><td>all</td><td class="n">{likeness.cosine:+.3f}</td>'
        f'<td class="n">{likeness.score:+.3f}</td></tr>'
    )
    losses = "; ".join(f"{_HOW.get(how, how)} {lost:.1%}" for how, lost in likeness.factors.items())
    said = (
        f"Factors averaged, away from the mean: {losses}."
        if losses
        else "Their ranks differ: factors cannot be averaged, merge updates instead."
    )
    hill = ""
    if found.hill is not None:
        title = f"Loss on the way from {found.names[0]} to {found.names[1]}"
        hill = f"<h3>{escape(title)}</h3>" + charts.lines(
            {"loss": found.hill.losses},
            title,
            xs=found.hill.places,
            ends=(found.names[0], found.names[1]),
        )
        hill += message(f"Barrier {found.hill.height:.3g}; the model alone has loss 1.")
    return (
        '<div class="wide"><table class="plain"><thead><tr><th>Block</th><th class="n">cosine</th>'
        f'<th class="n">score R</th></tr></thead><tbody>{rows}{total}</tbody></table></div>'
        f"{message(said)}{hill}"
    )
