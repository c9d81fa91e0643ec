"""The Zoo tab: LoRA files in, LoRA files out."""

from typing import Any

import gradio as gr

from cmlora.ui import zoo_files, zoo_measure, zoo_merge, zoo_packs, zoo_survey
from cmlora.ui.panels import message
from cmlora.ui.rail import Rail
from cmlora.ui.studio import Studio
from cmlora.ui.tab_generate import visitor
from cmlora.ui.zoo_results import Bench


def build(studio: Studio, rail: Rail) -> None:
    """Draw the tab and wire it."""
    with gr.Row(elem_classes="said"):
        gr.HTML(
            '<p class="note">New files appear among the LoRAs at once; nothing is replaced. What '
            "needs the model waits for its turn.</p>"
        )
        halt = gr.Button("Stop", elem_id="zoo-stop", scale=0, min_width=100)
    stopped = gr.HTML("", elem_id="zoo-said")
    merging = zoo_merge.draw(studio)
    files = zoo_files.draw(studio)
    shelves = zoo_survey.draw()
    measuring = zoo_measure.draw(studio)
    packing = zoo_packs.draw(studio)
    bench = Bench(studio, rail, files.lora)
    zoo_merge.wire(bench, merging)
    zoo_files.wire(bench, files)
    zoo_survey.wire(bench, shelves)
    zoo_measure.wire(bench, measuring, merging.calib)
    zoo_packs.wire(bench, packing)

    def on_stop(request: gr.Request) -> str:
        count = studio.tickets.stop(visitor(request))
        return message("Stopped." if count else "Nothing of yours is running.")

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    halt.click(on_stop, None, stopped, queue=False, **quiet)
