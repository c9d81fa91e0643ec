"""The Zoo's section on single files: look at one, make it smaller, convert it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from cmlora.adapters.compression import RULES
from cmlora.ui.panels import message
from cmlora.ui.rail import FOLLOWING
from cmlora.ui.studio import Studio
from cmlora.ui.talk import sentence
from cmlora.ui.workbench import compress, convert, inspect
from cmlora.ui.zoo_results import QUIET, RUNNING, Bench, facts_html, method_html

_SHOWN = (
    "trainer",
    "family",
    "base",
    "naming",
    "category",
    "triggers",
    "tags",
    "modules",
    "rank",
    "alpha",
    "dtypes",
    "forms",
    "leftover",
    "bytes",
    "sha256",
    "autov2",
    "autov3",
    "file",
)


@dataclass(frozen=True)
class Files:
    """The section's components."""

    lora: gr.Dropdown
    look: gr.Button
    found: gr.HTML
    rule: gr.Dropdown
    keep: gr.Number
    half: gr.Checkbox
    shrink: gr.Button
    note: gr.HTML
    rank: gr.Number
    loose: gr.Checkbox
    turn: gr.Button
    changed: gr.HTML


def draw(studio: Studio) -> Files:
    """Draw the section."""
    gr.HTML("<h2>Inspect, shrink or convert one file</h2>")
    names = list(studio.lora_paths(studio.default_model()))
    with gr.Row(elem_classes="act"):
        lora = gr.Dropdown(names, value=None, label="LoRA", elem_id="zoo-lora")
        look = gr.Button("Inspect", elem_id="inspect", scale=0, min_width=120)
    found = gr.HTML(elem_id="inspected")
    with gr.Row(elem_classes="act"):
        rule = gr.Dropdown(list(RULES), value="energy", label="Make it smaller", elem_id="rule")
        keep = gr.Number(None, label="Keep (0: the usual)", elem_id="keep")
        half = gr.Checkbox(label="In half precision", elem_id="half")
        shrink = gr.Button("Compress", elem_id="compress", scale=0, min_width=120)
    note = gr.HTML(_rule_note("energy"))
    with gr.Row(elem_classes="act"):
        rank = gr.Number(None, label="As an ordinary LoRA; largest rank (0: exact)", precision=0)
        loose = gr.Checkbox(label="Leave out biases and norms")
        turn = gr.Button("Convert", elem_id="convert", scale=0, min_width=120)
    changed = gr.HTML(elem_id="changed")
    return Files(lora, look, found, rule, keep, half, shrink, note, rank, loose, turn, changed)


def wire(bench: Bench, parts: Files) -> None:
    """Connect the section."""
    studio, rail = bench.studio, bench.rail

    def on_look(model: str, lora: str) -> str:
        try:
            facts = inspect(studio, model, lora or "")
        except Exception as error:
            return message(sentence(error), "error")
        return facts_html({key: facts[key] for key in _SHOWN if facts.get(key, "-") != "-"})

    def on_shrink(
        model: str, text: str, lora: str, how: str, share: Any, small: bool, request: gr.Request
    ) -> Iterator[list[Any]]:
        yield from bench.follow(
            lambda _: compress(studio, model, lora or "", how, share, half=bool(small)),
            model,
            text,
            request,
        )

    def on_turn(
        model: str, text: str, lora: str, most: Any, loosely: bool, request: gr.Request
    ) -> Iterator[list[Any]]:
        yield from bench.follow(
            lambda _: convert(studio, model, lora or "", most, loose=bool(loosely)),
            model,
            text,
            request,
        )

    parts.rule.change(_rule_note, parts.rule, parts.note, **QUIET)
    rail.model.change(
        lambda model: gr.Dropdown(choices=list(studio.lora_paths(model)), value=None),
        rail.model,
        parts.lora,
        **FOLLOWING,
    )
    parts.look.click(on_look, [rail.model, parts.lora], parts.found, **QUIET)
    results = [parts.changed, *bench.results]
    parts.shrink.click(
        on_shrink,
        [rail.model, rail.loras, parts.lora, parts.rule, parts.keep, parts.half],
        results,
        show_progress_on=parts.changed,
        **RUNNING,
    )
    parts.turn.click(
        on_turn,
        [rail.model, rail.loras, parts.lora, parts.rank, parts.loose],
        results,
        show_progress_on=parts.changed,
        **RUNNING,
    )


def _rule_note(rule: str) -> str:
    return method_html(RULES[rule].sentence)
