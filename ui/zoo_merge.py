"""The Zoo's first section: several LoRAs become one, by a formula or by learning."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from cmlora.adapters.merging import MERGES
from cmlora.ui import calibrations, learned, libraries, workbench
from cmlora.ui.forms import read_selection
from cmlora.ui.learned import OBJECTIVES, Task
from cmlora.ui.order import read_options
from cmlora.ui.rail import FOLLOWING
from cmlora.ui.studio import Studio
from cmlora.ui.talk import sentence
from cmlora.ui.zoo_results import RUNNING, Bench, method_html


@dataclass(frozen=True)
class Merging:
    """The section's components."""

    method: gr.Dropdown
    rank: gr.Number
    options: gr.Textbox
    name: gr.Textbox
    calib: gr.Dropdown
    learning: gr.Group
    objective: gr.Dropdown
    prompt: gr.Textbox
    questions: gr.Number
    control: gr.Checkbox
    pictures: gr.File
    note: gr.HTML
    join: gr.Button
    merged: gr.HTML


def draw(studio: Studio) -> Merging:
    """Draw the section."""
    gr.HTML("<h2>Merge the selected LoRAs into one</h2>")
    with gr.Row():
        method = gr.Dropdown(
            [*MERGES, *learned.NAMES], value="svd", label="Method", elem_id="merge-method"
        )
        rank = gr.Number(None, label="Largest rank (0: any)", precision=0, elem_id="merge-rank")
        options = gr.Textbox(label="Options", placeholder="density=0.5", elem_id="merge-options")
        name = gr.Textbox(label="Name of the result", elem_id="merge-name")
    calib = gr.Dropdown(
        list(calibrations.shelf(studio).listing()),
        value=None,
        label="Calibration data",
        visible=False,
        elem_id="merge-calib",
    )
    with gr.Column(visible=False) as learning:
        with gr.Row():
            objective = gr.Dropdown(
                list(OBJECTIVES), value=next(iter(OBJECTIVES)), label="Learn towards"
            )
            prompt = gr.Textbox(label="Prompt (trigger words if empty)")
            questions = gr.Number(4, label="Denoising steps asked about", precision=0)
        control = gr.Checkbox(True, label="Learn on random LoRAs too, as a control")
        pictures = gr.File(
            label="Pictures to learn from",
            file_count="multiple",
            file_types=["image"],
            height=120,
            visible=False,
            elem_id="merge-pictures",
        )
    note = gr.HTML(note_html(studio, "", "svd", {}), elem_id="merge-note")
    with gr.Row():
        join = gr.Button(
            "Merge", variant="primary", interactive=False, elem_id="merge", scale=0, min_width=160
        )
    merged = gr.HTML(elem_id="merged")
    return Merging(
        method,
        rank,
        options,
        name,
        calib,
        learning,
        objective,
        prompt,
        questions,
        control,
        pictures,
        note,
        join,
        merged,
    )


def wire(bench: Bench, parts: Merging) -> None:
    """Connect the section."""
    studio, rail = bench.studio, bench.rail

    def on_change(
        model: str, text: str, way: str, calib: str | None, towards: str, files: list[str] | None
    ) -> list[Any]:
        chosen, count = read_selection(text), len(files or ())
        objective = OBJECTIVES.get(towards, "distill")
        problem = needs(studio, model, way, chosen, calib or "", objective, count)
        known = list(calibrations.shelf(studio).listing())
        asks = way in MERGES and MERGES[way].object.needs_grams
        return [
            note_html(studio, model, way, chosen, problem),
            gr.Button(interactive=not problem),
            gr.Dropdown(choices=known, value=calib if calib in known else None, visible=asks),
            gr.Column(visible=way in learned.NAMES),
            gr.File(visible=objective == "denoise_mse"),
        ]

    def on_merge(
        model: str,
        text: str,
        way: str,
        most: Any,
        given: str,
        called: str,
        calib: str | None,
        towards: str,
        prompt: str,
        questions: Any,
        control: bool,
        files: list[str] | None,
        request: gr.Request,
    ) -> Iterator[list[Any]]:
        def start(ticket: Any) -> Any:
            chosen, settings = read_selection(text), read_options(given or "")
            if way in learned.NAMES:
                task = Task(
                    OBJECTIVES.get(towards, towards),
                    (prompt or "").strip(),
                    [Path(file) for file in files or ()],
                    questions,
                    bool(control),
                )
                return learned.learn(
                    studio,
                    model,
                    chosen,
                    way,
                    task,
                    ticket,
                    name=called or "",
                    rank=most,
                    options=settings,
                )
            return workbench.merge(
                studio,
                model,
                chosen,
                way,
                name=called or "",
                rank=most,
                options=settings,
                calib=calib or "",
            )

        yield from bench.follow(start, model, text, request)

    state = [rail.model, rail.loras, parts.method, parts.calib, parts.objective, parts.pictures]
    gr.on(
        [
            parts.method.change,
            parts.calib.change,
            parts.objective.change,
            parts.pictures.change,
            rail.loras.change,
        ],
        on_change,
        state,
        [parts.note, parts.join, parts.calib, parts.learning, parts.pictures],
        **FOLLOWING,
    )
    parts.join.click(
        on_merge,
        [
            rail.model,
            rail.loras,
            parts.method,
            parts.rank,
            parts.options,
            parts.name,
            parts.calib,
            parts.objective,
            parts.prompt,
            parts.questions,
            parts.control,
            parts.pictures,
        ],
        [parts.merged, *bench.results],
        show_progress_on=parts.merged,
        **RUNNING,
    )


def needs(
    studio: Studio,
    model: str,
    method: str,
    loras: dict[str, float],
    calib: str = "",
    objective: str = "distill",
    pictures: int = 0,
) -> str:
    """What a merge needs and has not been given, whatever its kind; empty if it can begin."""
    if method in learned.NAMES:
        return learned.missing(method, len(loras), objective, pictures)
    problem = workbench.missing(method, len(loras), calib)
    if problem or method not in MERGES or not MERGES[method].object.needs_grams:
        return problem
    try:
        left = calibrations.uncovered(studio, model, loras, calib)
    except Exception as error:
        return sentence(error).rstrip(".")
    return f"{calib} knows nothing of {left[0]}; measure the selection again" if left else ""


def note_html(
    studio: Studio, model: str, method: str, loras: dict[str, float], problem: str | None = None
) -> str:
    """What a merging method does, and what it still needs."""
    told = needs(studio, model, method, loras) if problem is None else problem
    if method in learned.NAMES:
        libraries.ready()
        from cmlora.pipelines.learning import LEARNED

        learner = LEARNED[method]
        return method_html(learner.sentence, learner.paper, learner.object.options(), told)
    entry = MERGES[method]
    return method_html(entry.sentence, entry.paper, entry.object.options(), told)
