"""The Zoo tab: LoRA files in, LoRA files out."""

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import gradio as gr

from cmlora.adapters.compression import RULES
from cmlora.adapters.merging import MERGES
from cmlora.ui.cards import cards
from cmlora.ui.forms import read_selection
from cmlora.ui.order import read_options
from cmlora.ui.panels import lora_list, message
from cmlora.ui.rail import Rail
from cmlora.ui.studio import Studio
from cmlora.ui.talk import sentence
from cmlora.ui.workbench import Made, compress, convert, inspect, merge, missing

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


def build(studio: Studio, rail: Rail) -> None:
    """Draw the tab and wire it."""
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    gr.HTML("<h2>Merge the selected LoRAs into one</h2>")
    with gr.Row():
        method = gr.Dropdown(list(MERGES), value="svd", label="Method", elem_id="merge-method")
        rank = gr.Number(None, label="Largest rank (0: any)", precision=0, elem_id="merge-rank")
        options = gr.Textbox(label="Options", placeholder="density=0.5", elem_id="merge-options")
        name = gr.Textbox(label="Name of the result", elem_id="merge-name")
    note = gr.HTML(merge_note("svd", 0), elem_id="merge-note")
    join = gr.Button("Merge", variant="primary", interactive=False, elem_id="merge")
    merged = gr.HTML(elem_id="merged")

    gr.HTML("<h2>One file</h2>")
    with gr.Row():
        which = gr.Dropdown(
            _names(studio, studio.default_model()), label="LoRA", elem_id="zoo-lora"
        )
        look = gr.Button("Inspect", elem_id="inspect", scale=0, min_width=120)
    found = gr.HTML(elem_id="inspected")
    with gr.Row():
        rule = gr.Dropdown(list(RULES), value="energy", label="Make it smaller", elem_id="rule")
        keep = gr.Number(None, label="Keep (0: the usual)", elem_id="keep")
        half = gr.Checkbox(label="In half precision", elem_id="half")
        shrink = gr.Button("Compress", elem_id="compress", scale=0, min_width=120)
    rule_note = gr.HTML(_rule_note("energy"))
    with gr.Row():
        to_rank = gr.Number(
            None, label="Convert to an ordinary LoRA; largest rank (0: exact)", precision=0
        )
        turn = gr.Button("Convert", elem_id="convert", scale=0, min_width=120)
    changed = gr.HTML(elem_id="changed")

    def on_selection(way: str, text: str) -> tuple[str, Any]:
        count = len(read_selection(text))
        return merge_note(way, count), gr.Button(interactive=not missing(way, count))

    def on_merge(model: str, text: str, way: str, most: Any, given: str, called: str) -> list[Any]:
        chosen = read_selection(text)
        return _made(
            studio,
            model,
            text,
            lambda: merge(
                studio,
                model,
                chosen,
                way,
                name=called or "",
                rank=most,
                options=read_options(given or ""),
            ),
        )

    def on_shrink(model: str, text: str, lora: str, how: str, share: Any, small: bool) -> list[Any]:
        return _made(
            studio,
            model,
            text,
            lambda: compress(studio, model, lora or "", how, share, half=bool(small)),
        )

    def on_turn(model: str, text: str, lora: str, most: Any) -> list[Any]:
        return _made(studio, model, text, lambda: convert(studio, model, lora or "", most))

    def on_look(model: str, lora: str) -> str:
        try:
            facts = inspect(studio, model, lora or "")
        except Exception as error:
            return message(sentence(error), "error")
        return facts_html({key: facts[key] for key in _SHOWN if facts.get(key, "-") != "-"})

    gr.on(
        [method.change, rail.loras.change],
        on_selection,
        [method, rail.loras],
        [note, join],
        **quiet,
    )
    rule.change(_rule_note, rule, rule_note, **quiet)
    rail.model.change(
        lambda model: gr.Dropdown(choices=_names(studio, model), value=None),
        rail.model,
        which,
        **quiet,
    )
    working: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
    results = [rail.listing, which]
    join.click(
        on_merge,
        [rail.model, rail.loras, method, rank, options, name],
        [merged, *results],
        show_progress_on=merged,
        **working,
    )
    shrink.click(
        on_shrink,
        [rail.model, rail.loras, which, rule, keep, half],
        [changed, *results],
        show_progress_on=changed,
        **working,
    )
    turn.click(
        on_turn,
        [rail.model, rail.loras, which, to_rank],
        [changed, *results],
        show_progress_on=changed,
        **working,
    )
    look.click(on_look, [rail.model, which], found, show_progress_on=found, **working)


def merge_note(method: str, count: int) -> str:
    """What a merging method does, and what it still needs."""
    entry = MERGES[method]
    options = ", ".join(
        f"<code>{escape(k)}={escape(str(v))}</code>" for k, v in entry.object.options().items()
    )
    sentence_ = entry.sentence[0].upper() + entry.sentence[1:]
    paper = f" <small>{escape(entry.paper)}</small>" if entry.paper else ""
    needs = missing(method, count)
    told = f'<br><b class="needs">{escape(needs[0].upper() + needs[1:])}.</b>' if needs else ""
    listed = f"<br><small>Options: {options}</small>" if options else ""
    return f'<p class="note">{escape(sentence_)}.{paper}{listed}{told}</p>'


def facts_html(facts: Mapping[str, str]) -> str:
    """Facts by title as a table."""
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in facts.items()
    )
    return f'<div class="wide"><table class="plain facts"><tbody>{rows}</tbody></table></div>'


def _made(studio: Studio, model: str, text: str, act: Callable[[], Made]) -> list[Any]:
    """What happened, and the lists with the new file in them."""
    try:
        made = act()
    except Exception as error:
        return [message(sentence(error), "error"), gr.skip(), gr.skip()]
    listing = lora_list(cards(studio, model), read_selection(text))
    head = message(f"{made.name} is among the LoRAs now.")
    return [head + facts_html(made.facts), listing, gr.Dropdown(choices=_names(studio, model))]


def _names(studio: Studio, model: str) -> list[str]:
    return list(studio.lora_paths(model))


def _rule_note(rule: str) -> str:
    sentence_ = RULES[rule].sentence
    return message(f"{sentence_[0].upper()}{sentence_[1:]}.")
