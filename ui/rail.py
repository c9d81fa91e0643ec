"""The left side of the page: the model and the LoRAs, shared by all tabs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from cmlora.ui.cards import cards, first_triggers
from cmlora.ui.forms import read_selection
from cmlora.ui.panels import lora_list, message
from cmlora.ui.prompts import follow
from cmlora.ui.studio import Studio
from cmlora.ui.talk import sentence
from cmlora.ui.uploads import keep_lora

FOLLOWING: dict[str, Any] = {
    "api_visibility": "private",
    "show_progress": "hidden",
    # gradio's own way repeats a change that came while another one was answered, with everything
    # that listens to it: two listeners whose answers overlap once would call each other for ever
    "trigger_mode": "multiple",
}
"""Of what is worked out anew when a field changes to which others listen too."""


@dataclass(frozen=True)
class Rail:
    """The components that other tabs read.

    Args:
        model: dropdown of models.
        loras: JSON of the selected LoRAs and their strengths.
        before: names that were selected when the prompt was last adapted.
        listing: the list itself.
    """

    model: gr.Dropdown
    loras: gr.Textbox
    before: gr.State
    listing: gr.HTML


def build(studio: Studio) -> Rail:
    """Draw the rail."""
    start = studio.default_model()
    with gr.Column(elem_classes="rail", elem_id="rail"):
        model = gr.Dropdown(
            studio.model_names(),
            value=start or None,
            label="Model",
            info="Or the name of a model on the hub." if studio.settings.hub else None,
            allow_custom_value=studio.settings.hub,
            elem_id="model",
        )
        gr.HTML("<h2>LoRAs</h2>")
        listing = gr.HTML(lora_list(cards(studio, start), {}), elem_id="lora-list")
        loras = gr.Textbox("{}", visible="hidden", elem_id="lora-state", label="Selection")
        before = gr.State([])
        with gr.Row():
            refresh = gr.Button("Look again", size="sm", min_width=90, elem_id="refresh")
            add = gr.UploadButton(
                "Add a file",
                size="sm",
                min_width=90,
                file_types=[".safetensors"],
                elem_id="add-lora",
            )
        said = gr.HTML(message(_welcome(studio)), elem_id="rail-message")

    def relist(name: str, text: str) -> str:
        return lora_list(cards(studio, name), read_selection(text))

    def remodel(name: str) -> tuple[str, str, list[str]]:
        return lora_list(cards(studio, name), {}), "{}", []

    def added(path: str, name: str, text: str) -> tuple[str, str]:
        try:
            kept = keep_lora(studio, Path(path))
            words = message(f"{kept} was added")
        except Exception as error:
            words = message(sentence(error), "error")
        return relist(name, text), words

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    refresh.click(relist, [model, loras], listing, **quiet)
    model.change(remodel, model, [listing, loras, before], **FOLLOWING)
    add.upload(added, [add, model, loras], [listing, said], **quiet)
    return Rail(model, loras, before, listing)


def adapt_prompt(
    studio: Studio, model: str, text: str, before: list[str], prompt: str
) -> tuple[str, list[str]]:
    """The prompt with the triggers of what was just selected, and the new selection."""
    chosen = list(read_selection(text))
    found = first_triggers(cards(studio, model))
    return follow(prompt or "", before, chosen, found), chosen


def selection_json(loras: dict[str, float]) -> str:
    """The selection as the page keeps it."""
    return json.dumps(loras, separators=(",", ":"))


def _welcome(studio: Studio) -> str:
    if studio.default_model():
        return ""
    return "There is no model yet: start with --model FOLDER, or with --hub to load one by name."
