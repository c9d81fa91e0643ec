"""The Generate tab: from the fields to pictures."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from cmlora.caching.policy import POLICIES
from cmlora.errors import CmloraError
from cmlora.strategies import METHODS
from cmlora.ui.actions import Picture, asked_again, generate, replay
from cmlora.ui.cards import cards
from cmlora.ui.forms import FIELDS, order_of, read_selection
from cmlora.ui.jobs import Event, Progress, Ticket
from cmlora.ui.natives import natives_or_guess
from cmlora.ui.order import SAMPLERS
from cmlora.ui.panels import (
    busy,
    lora_list,
    message,
    method_note,
    recipe_panel,
    stage,
    summary,
)
from cmlora.ui.previews import data_uri
from cmlora.ui.rail import FOLLOWING, Rail, adapt_prompt, selection_json
from cmlora.ui.studio import Studio
from cmlora.ui.talk import sentence

PIPELINE = "pipeline"
"""Everything that uses the model shares this queue: one at a time."""

_TELL_EVERY = 0.2  # seconds between two events that show no new preview


@dataclass(frozen=True)
class Generate:
    """What other tabs use of this one.

    Args:
        fields: the inputs, by the names of `cmlora.ui.forms.FIELDS`.
        to_compare: the button.
        cost: where the cost preview is shown.
    """

    fields: dict[str, Any]
    to_compare: gr.Button
    cost: gr.HTML

    @property
    def inputs(self) -> list[Any]:
        """The fields in order."""
        return [self.fields[name] for name in FIELDS]


def build(studio: Studio, rail: Rail) -> Generate:
    """Draw the tab and wire it."""
    limits = studio.settings.limits
    fit = natives_or_guess(studio, studio.default_model())
    width, height = fit.size or (None, None)
    with gr.Row(elem_classes="workspace"):
        with gr.Column(scale=5, min_width=300):
            prompt = gr.Textbox(
                label="Prompt",
                lines=3,
                max_lines=8,
                placeholder="Trigger words come with each LoRA. <lora:name:0.8> works too.",
                elem_id="prompt",
            )
            method = gr.Dropdown(list(METHODS), value="cmlora", label="Method", elem_id="method")
            note = gr.HTML(method_note("cmlora"), elem_classes="note")
            with gr.Row():
                steps = gr.Slider(
                    1, limits.steps, fit.steps, step=1, label="Steps", elem_id="steps"
                )
                guidance = gr.Slider(
                    0, 20, fit.guidance, step=0.5, label="Guidance", elem_id="guidance"
                )
            with gr.Row():
                wide = gr.Number(
                    width, label="Width", precision=0, step=8, min_width=90, elem_id="width"
                )
                high = gr.Number(
                    height, label="Height", precision=0, step=8, min_width=90, elem_id="height"
                )
                seed = gr.Number(0, label="Seed", precision=0, min_width=90, elem_id="seed")
                pictures = gr.Number(
                    1,
                    label="Pictures",
                    precision=0,
                    minimum=1,
                    maximum=limits.pictures,
                    min_width=90,
                    elem_id="pictures",
                )
            with gr.Accordion("More settings", open=False):
                negative = gr.Textbox(label="Negative prompt", lines=2, elem_id="negative")
                with gr.Row():
                    sampler = gr.Dropdown(list(SAMPLERS), value="model's own", label="Sampler")
                    cache = gr.Dropdown(
                        ["", *POLICIES],
                        value="",
                        label="Cache policy",
                        info="Empty: the method's own. Also uniform:3.",
                        allow_custom_value=True,
                    )
                options = gr.Textbox(
                    label="Options of the method", placeholder="tau=3; order=high_first"
                )
                schedule = gr.Textbox(
                    label="Strengths over the run",
                    placeholder="[<lora:ink:1>:0.2,0.8] or <lora:ink:0@0,1@0.5>",
                    elem_id="schedule",
                )
                everywhere = gr.Dropdown(
                    [],
                    value=[],
                    multiselect=True,
                    label="LoRAs that act on the whole picture",
                    info="Styles, for gate, select and auto. Files that say so need no mention.",
                    elem_id="everywhere",
                )
            cost = gr.HTML(elem_id="cost")
            with gr.Row():
                go = gr.Button(
                    "Generate", variant="primary", size="lg", min_width=160, elem_id="generate"
                )
                halt = gr.Button(
                    "Stop", size="lg", interactive=False, min_width=100, scale=0, elem_id="stop"
                )
        with gr.Column(scale=6, min_width=300):
            scene = gr.HTML(stage(), elem_id="stage")
            queue = gr.HTML("", elem_id="queue")
            gallery = gr.Gallery(
                label="Pictures of this visit",
                columns=6,
                height=150,
                object_fit="contain",
                buttons=["download", "fullscreen"],
                elem_id="gallery",
                interactive=False,
                format="png",
                allow_preview=False,
                fit_columns=False,
            )
            with gr.Row():
                save = gr.DownloadButton(
                    "Download PNG", interactive=False, min_width=140, elem_id="download"
                )
                reuse = gr.Button("Use its settings", min_width=140, elem_id="reuse")
                to_compare = gr.Button("Send to compare", min_width=140, elem_id="to-compare")
            recipe = gr.HTML(
                message("The recipe of a picture appears here; it is also inside the PNG."),
                elem_id="recipe",
            )
            dropped = gr.File(
                label="Drop a picture made by cmlora to make it again",
                file_types=[".png"],
                height=130,
                elem_id="replay",
            )
    made, asked = gr.State([]), gr.State(0)

    fields = dict(
        zip(
            FIELDS,
            (
                rail.model,
                rail.loras,
                prompt,
                negative,
                method,
                options,
                cache,
                sampler,
                steps,
                guidance,
                wide,
                high,
                seed,
                pictures,
                schedule,
                everywhere,
            ),
            strict=True,
        )
    )
    shown = [scene, gallery, made, recipe, save, go, halt, queue]
    running: dict[str, Any] = {
        "concurrency_id": PIPELINE,
        "concurrency_limit": 1,
        "api_visibility": "private",
        "show_progress": "minimal",
        "show_progress_on": queue,
    }
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

    def on_generate(
        number: int, old: list[Picture], request: gr.Request, *values: Any
    ) -> Iterator[list[Any]]:
        with studio.tickets.take(visitor(request), number) as ticket:
            yield from _follow(lambda: generate(studio, order_of(*values), ticket), old)

    def on_replay(
        old: list[Picture], path: str | None, model: str, request: gr.Request
    ) -> Iterator[list[Any]]:
        if path is None:
            yield [gr.skip()] * len(shown)
            return
        with studio.tickets.take(visitor(request)) as ticket:
            yield from _follow(lambda: replay(studio, path, model or "", ticket), old, Path(path))

    def on_stop(request: gr.Request) -> tuple[str, Any, Any]:
        studio.tickets.stop(visitor(request))
        return stage(words="Stopped.", kind="error"), gr.Button(interactive=True), _off()

    def on_select(event: gr.SelectData, found: list[Picture]) -> tuple[str, str, Any]:
        picture = found[event.index]
        return _show(picture), recipe_panel(picture.recipe, summary(picture)), _file(picture)

    def on_press(request: gr.Request) -> tuple[int, str, Any, Any]:
        waiting = stage(words="Waiting for its turn.", kind="busy")
        number = studio.tickets.ask(visitor(request))
        return number, waiting, _off(), gr.Button(interactive=True)

    begin = go.click(on_press, None, [asked, scene, go, halt], queue=False, **quiet)
    begin.then(on_generate, [asked, made, *fields.values()], shown, **running)
    dropped.upload(on_replay, [made, dropped, rail.model], shown, **running)
    halt.click(on_stop, None, [scene, go, halt], queue=False, **quiet)
    gallery.select(on_select, made, [scene, recipe, save], **quiet)
    method.change(method_note, method, note, **FOLLOWING)
    # as the only listener to the selection that waits for its last answer: it changes what it reads
    rail.loras.change(
        lambda *values: adapt_prompt(studio, *values),
        [rail.model, rail.loras, rail.before, prompt],
        [prompt, rail.before],
        **quiet,
    )

    refilled = [name for name in FIELDS if name not in ("model", "loras")]

    def on_reuse(path: str | None, model: str) -> list[Any]:
        try:
            if path is None:
                raise CmloraError("there is no picture yet")
            found = asked_again(studio, path, model)
        except Exception as error:
            return [gr.skip()] * (len(refilled) + 3) + [message(sentence(error), "error")]
        loras = found["loras"]
        found["everywhere"] = gr.Dropdown(list(loras), value=found["everywhere"])
        listing = lora_list(cards(studio, model), loras)
        selection = [listing, selection_json(loras), list(loras)]
        return [*(found[name] for name in refilled), *selection, gr.skip()]

    reuse.click(
        on_reuse,
        [save, rail.model],
        [*(fields[name] for name in refilled), rail.listing, rail.loras, rail.before, recipe],
        **quiet,
    )

    def on_selection(text: str, listed: list[str]) -> Any:
        names = list(read_selection(text))
        return gr.Dropdown(names, value=[name for name in listed or () if name in names])

    rail.loras.change(on_selection, [rail.loras, everywhere], everywhere, **FOLLOWING)

    def on_model(name: str) -> list[Any]:
        fit = natives_or_guess(studio, name)
        return [fit.steps, fit.guidance, *(fit.size or (None, None))]

    rail.model.change(on_model, rail.model, [steps, guidance, wide, high], **FOLLOWING)
    return Generate(fields, to_compare, cost)


def visitor(request: gr.Request | None) -> str:
    """Whose request this is: one page or one client."""
    found = None if request is None else request.session_hash
    return found or "somebody"


def _follow(start: Any, old: list[Picture], dropped: Path | None = None) -> Iterator[list[Any]]:
    """The page's outputs while work goes on: stage, gallery, pictures, recipe, file, buttons."""
    same, found = gr.skip(), list(old)
    busy_buttons = [gr.Button(interactive=False), gr.Button(interactive=True)]
    free = [gr.Button(interactive=True), _off()]
    try:
        events: Iterator[Event] = start()
        last, due, buttons = "", 0.0, busy_buttons
        for event in events:
            if isinstance(event, Progress):
                last, now = event.preview or last, time.monotonic()
                if event.preview or now >= due:
                    scene = busy(replace(event, preview=last))
                    yield [scene, same, same, same, same, *buttons, ""]
                    due, buttons = now + _TELL_EVERY, [same, same]
                continue
            picture: Picture = event.value
            found = [picture, *(p for p in found if p.path != picture.path)]
            last = ""
            panel = recipe_panel(picture.recipe, summary(picture))
            words = _verdict(picture, dropped)
            yield [
                _show(picture, words),
                [str(p.path) for p in found],
                found,
                panel,
                _file(picture),
                same,
                same,
                "",
            ]
        yield [same, same, same, same, same, *free, ""]
    except Exception as error:
        yield [stage(words=sentence(error), kind="error"), same, same, same, same, *free, ""]


def _show(picture: Picture, words: str = "") -> str:
    from PIL import Image

    with Image.open(picture.path) as image:
        return stage(data_uri(image, 768), words=words or summary(picture), kind="done")


def _verdict(picture: Picture, dropped: Path | None) -> str:
    """Whether a replayed picture is the dropped one."""
    if dropped is None:
        return ""
    same = dropped.is_file() and dropped.read_bytes() == picture.path.read_bytes()
    words = "The same picture, bit for bit" if same else "Made again, with other library versions"
    return f"{words} · {summary(picture)}"


def _file(picture: Picture) -> Any:
    return gr.DownloadButton(value=str(picture.path), interactive=True)


def _off() -> Any:
    return gr.Button(interactive=False)


__all__ = ["PIPELINE", "Generate", "Ticket", "build", "visitor"]
