"""The Zoo's section on the whole shelf: what is alike, what is twice there, what forms groups."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape

import gradio as gr

from cmlora.adapters.analysis.heatmap import Heatmap
from cmlora.ui.jobs import Progress
from cmlora.ui.panels import busy, message
from cmlora.ui.surveys import Survey, look_over
from cmlora.ui.tab_compare import compact
from cmlora.ui.tab_generate import visitor
from cmlora.ui.talk import sentence
from cmlora.ui.zoo_results import RUNNING, Bench, method_html

_SHOWN = 24  # LoRAs up to which the table of all pairs can be read


@dataclass(frozen=True)
class Shelves:
    """The section's components."""

    button: gr.Button
    found: gr.HTML


def draw() -> Shelves:
    """Draw the section."""
    gr.HTML("<h2>What is on the shelf?</h2>")
    with gr.Row(elem_classes="act"):
        gr.HTML(
            method_html(
                "Compares all LoRAs of the model with each other, from their files: groups, "
                "nearest neighbours, and the same LoRA under two names"
            )
        )
        button = gr.Button("Look over", elem_id="survey", scale=0, min_width=120)
    return Shelves(button, gr.HTML(elem_id="surveyed"))


def wire(bench: Bench, parts: Shelves) -> None:
    """Connect the section."""
    studio, rail = bench.studio, bench.rail

    def on_look(model: str, request: gr.Request) -> Iterator[str]:
        try:
            with studio.tickets.take(visitor(request)) as ticket:
                for event in look_over(studio, model, ticket):
                    if isinstance(event, Progress):
                        yield compact(busy(replace(event, preview="")))
                    else:
                        yield survey_html(event.value)
        except Exception as error:
            yield message(sentence(error), "error")

    parts.button.click(on_look, rail.model, parts.found, show_progress_on=parts.found, **RUNNING)


def survey_html(found: Survey) -> str:
    """Groups and neighbours as a table, duplicates and what was left out as sentences."""
    library = found.library
    groups = {name: i for i, group in enumerate(library.clusters, 1) for name in group}
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{groups[name]}</td><td>'
        + escape(", ".join(f"{other} {cosine:+.2f}" for other, cosine in near))
        + "</td></tr>"
        for name, near in sorted(
            library.neighbours().items(), key=lambda item: (groups[item[0]], item[0])
        )
    )
    said = [f"{' and '.join(group)} are one LoRA." for group in library.duplicates]
    said += [f"{name} was left out: {why}" for name, why in found.left_out.items()]
    drawn = ""
    if len(library.names) <= _SHOWN:
        values = tuple(tuple(map(float, row)) for row in library.similarity)
        table = Heatmap("Cosine of the updates", library.names, library.names, values)
        drawn = f'<div class="wide">{table.drawing().svg()}</div>'
    return (
        '<div class="wide"><table class="plain"><thead><tr><th>LoRA</th><th class="n">group</th>'
        f"<th>nearest</th></tr></thead><tbody>{rows}</tbody></table></div>"
        + "".join(map(message, said))
        + drawn
    )
