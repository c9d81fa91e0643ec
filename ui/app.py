"""The page: the rail, the tabs, and what they share."""

from typing import Any

import gradio as gr

from cmlora.ui import (
    api,
    rail,
    tab_compare,
    tab_generate,
    tab_judge,
    tab_understand,
    tab_zoo,
)
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
            with gr.Column(elem_classes="work"), gr.Tabs(elem_id="tabs") as tabs:
                _tabs(studio, left, tabs)
        api.build(studio)
    return page


def _tabs(studio: Studio, left: rail.Rail, tabs: gr.Tabs) -> None:
    with gr.Tab("Generate", id="generate"):
        generate = tab_generate.build(studio, left)
    with gr.Tab("Compare", id="compare"):
        done = tab_compare.build(studio, left, generate, tabs)
    with gr.Tab("Understand", id="understand"):
        tab_understand.build(studio, left, generate)
    with gr.Tab("Judge", id="judge"):
        tab_judge.build(studio, done)
    with gr.Tab("Zoo", id="zoo"):
        tab_zoo.build(studio, left)
