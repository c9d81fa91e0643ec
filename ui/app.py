"""The page: the rail, the tabs, and what they share."""

from typing import Any

import gradio as gr

from cmlora.ui import rail, tab_generate
from cmlora.ui.look import HEADER
from cmlora.ui.studio import Studio


def build(studio: Studio) -> Any:
    """The whole page, ready to be launched.

    Args:
        studio: the server's models, LoRAs and settings.
    """
    with gr.Blocks(
        title="cmlora", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
    ) as page:
        gr.HTML(HEADER)
        with gr.Row(elem_classes="shell"):
            left = rail.build(studio)
            with gr.Column(elem_classes="main"), gr.Tabs(elem_id="tabs"):
                _tabs(studio, left)
    return page


def _tabs(studio: Studio, left: rail.Rail) -> None:
    with gr.Tab("Generate", id="generate"):
        tab_generate.build(studio, left)
