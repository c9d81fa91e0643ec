"""The Understand tab: why these LoRAs behave as they do, before and while they are rendered."""

from collections.abc import Iterator
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from cmlora.frequency.profile import measure
from cmlora.ui import charts, libraries
from cmlora.ui.contributions import Contributions, contributions, overlay
from cmlora.ui.estimates import cost_panel
from cmlora.ui.forms import order_of
from cmlora.ui.jobs import Clock, Event, Newest, Progress, Result, Ticket, stream
from cmlora.ui.jobs import Report as Tell
from cmlora.ui.order import Order
from cmlora.ui.panels import busy, message
from cmlora.ui.previews import data_uri
from cmlora.ui.rail import FOLLOWING, Rail
from cmlora.ui.studio import Studio
from cmlora.ui.tab_compare import compact
from cmlora.ui.tab_generate import PIPELINE, Generate, visitor
from cmlora.ui.talk import sentence
from cmlora.ui.understanding import diagnosis, profiles, timeline

_PROFILE_STEPS = 12

_PATIENCE = 4.0
"""Seconds for which what is only foreseen lets pictures go first; they share the processor."""


def build(studio: Studio, rail: Rail, generate: Generate) -> None:
    """Draw the tab and wire it; the cost preview of the Generate tab is wired here too."""
    gr.HTML("<h2>Schedule</h2>")
    gr.HTML(
        '<p class="note">What each pass does at each step, for the settings of the Generate tab. '
        "Solid: computed in full. Thin: features reused. A white dot: the dominant LoRA.</p>"
    )
    plan = gr.HTML(elem_id="timeline")
    gr.HTML("<h2>Frequency profiles</h2>")
    gr.HTML(
        '<p class="note">How much of what a LoRA contributes is detail, and when it contributes. '
        "Measured with a few steps on the selected model; later pictures are ordered by it.</p>"
    )
    curves = gr.HTML(elem_id="profiles")
    with gr.Row():
        probe = gr.Button("Measure profiles", elem_id="measure", scale=0, min_width=230)
        probed = gr.HTML("", elem_id="measure-said")
    gr.HTML("<h2>Who painted what</h2>")
    gr.HTML(
        '<p class="note">Renders one picture and measures beside it what every LoRA alone would '
        "have changed, where and when.</p>"
    )
    with gr.Row():
        watch = gr.Button("Render and measure", elem_id="witness", scale=0, min_width=230)
        watched = gr.HTML("", elem_id="witness-said")
    painted = gr.HTML(elem_id="painted")
    gr.HTML("<h2>Doctor</h2>")
    with gr.Row():
        ask = gr.Button("Examine the files", elem_id="doctor", scale=0, min_width=230)
    findings = gr.HTML(elem_id="findings")

    running: dict[str, Any] = {
        "concurrency_id": PIPELINE,
        "concurrency_limit": 1,
        "api_visibility": "private",
        "show_progress": "minimal",
    }

    foreseen = Newest()

    def foresee(request: gr.Request, *values: Any) -> list[Any]:
        with foreseen.turn(visitor(request)) as wanted:
            if not wanted:
                return [gr.skip()] * 3
            try:
                order = order_of(*values)
            except Exception as error:
                return [message(sentence(error), "error")] * 3
            libraries.ready()
            studio.tickets.idle(_PATIENCE)
            return [
                cost_panel(studio, order),
                timeline_html(studio, order),
                profiles_html(studio, order),
            ]

    gr.on(
        None,  # when the page opens, and whenever a field changes
        foresee,
        generate.inputs,
        [generate.cost, plan, curves],
        queue=False,
        **FOLLOWING,
    )

    def on_measure(request: gr.Request, *values: Any) -> Iterator[tuple[str, Any]]:
        try:
            order = order_of(*values)
            with studio.tickets.take(visitor(request)) as ticket:
                for event in measured(studio, order, ticket):
                    if isinstance(event, Progress):
                        yield compact(busy(event)), gr.skip()
            yield message("Measured; the next pictures use it."), profiles_html(studio, order)
        except Exception as error:
            yield message(sentence(error), "error"), gr.skip()

    def on_watch(request: gr.Request, *values: Any) -> Iterator[tuple[str, Any]]:
        try:
            with studio.tickets.take(visitor(request)) as ticket:
                for event in contributions(studio, order_of(*values), ticket):
                    if isinstance(event, Progress):
                        yield compact(busy(replace(event, preview=""))), gr.skip()
                    else:
                        yield "", painted_html(event.value)
        except Exception as error:
            yield message(sentence(error), "error"), gr.skip()

    def on_ask(*values: Any) -> str:
        try:
            return findings_html(studio, order_of(*values))
        except Exception as error:
            return message(sentence(error), "error")

    probe.click(on_measure, generate.inputs, [probed, curves], show_progress_on=probed, **running)
    watch.click(on_watch, generate.inputs, [watched, painted], show_progress_on=watched, **running)
    ask.click(on_ask, generate.inputs, findings, api_visibility="private", show_progress="minimal")


def measured(studio: Studio, order: Order, ticket: Ticket) -> Iterator[Event]:
    """Measure the frequency profile of every selected LoRA on the selected model.

    Nothing is written; the server remembers the profiles and orders later pictures by them.

    Args:
        studio: the server's.
        order: which LoRAs, which model.
        ticket: stops the work.

    Yields:
        `Progress`, and a `Result` with the names of what was measured.

    Raises:
        CmloraError: if the order cannot be fulfilled.
    """
    from cmlora.ui.actions import complete

    order = complete(studio, order)

    def work(tell: Tell) -> None:
        clock = Clock(len(order.loras))
        tell(Progress(0, clock.total, "loading"))
        with studio.pipeline(order.model, order.loras) as pipe:
            for name, lora in sorted(pipe.loras.items()):
                ticket.check()
                with ticket.guarding(getattr(pipe.pipe, "unet", None) or pipe.pipe.transformer):
                    found = measure(
                        pipe.pipe,
                        name,
                        [lora.applied.triggers[0] if lora.applied.triggers else order.prompt],
                        steps=_PROFILE_STEPS,
                        seeds=(0,),
                        guidance_scale=7.5 if order.guidance is None else order.guidance,
                    )
                studio.remember(lora.applied.sha256, found)
                clock.tick()
                tell(Progress(clock.done, clock.total, name, clock.left()))
            tell(Result(sorted(pipe.loras)))

    return stream(work, ticket)


def timeline_html(studio: Studio, order: Order) -> str:
    """The schedule and the strengths over the steps."""
    try:
        found = timeline(studio, order)
    except Exception as error:
        return message(sentence(error))
    if not found.names:
        return charts.timeline(found)
    remark = "Shares are decided by the picture while it runs." if found.open else ""
    strengths = "" if found.open else charts.lines(found.strengths, "Strength over the steps")
    return (
        f'<p class="note">{found.full:g} full passes, {found.light:g} light. {remark}</p>'
        f"{charts.timeline(found)}"
        + (f"<h3>Effective strength</h3>{strengths}" if strengths else "")
        + charts.legend(found.names)
    )


def profiles_html(studio: Studio, order: Order) -> str:
    """The known profiles as curves."""
    try:
        found = profiles(studio, order)
    except Exception as error:
        return message(sentence(error))
    if not found:
        return message("No profile is known for the selected LoRAs yet.")
    colours = {name: index for index, name in enumerate(order.loras)}
    first = next(iter(found.values()))
    same = all(profile.fractions == first.fractions for profile in found.values())
    xs = first.fractions if same else None
    return (
        "<h3>Share of detail in what it contributes</h3>"
        + charts.lines(
            {name: p.ratio for name, p in found.items()}, "Detail", xs=xs, colours=colours
        )
        + "<h3>Size of the contribution</h3>"
        + charts.lines(
            {name: p.norm for name, p in found.items()}, "Contribution", xs=xs, colours=colours
        )
        + charts.legend(list(found), colours)
    )


def painted_html(found: Contributions) -> str:
    """The picture, each LoRA's share of it in place and in time."""
    with Image.open(found.picture.path) as file:
        picture = file.convert("RGB")
    shares = found.shares()
    figures = [
        f'<figure><img src="{data_uri(picture)}" alt="Picture"><figcaption>Picture</figcaption>'
        "</figure>"
    ]
    for index, name in enumerate(found.names):
        if name in found.maps:
            image = data_uri(overlay(picture, found.maps[name], charts.rgb(index)))
            figures.append(
                f'<figure><img src="{image}" alt="Where {escape(name, quote=True)} painted">'
                f"<figcaption>{escape(name)}<small>{shares[name]:.0%} of all changes</small>"
                "</figcaption></figure>"
            )
    idle = [name for name, share in shares.items() if share < 0.02]
    warning = message(f"Hardly any effect: {', '.join(idle)}.") if idle and len(shares) > 1 else ""
    return (
        f'<div class="maps">{"".join(figures)}</div>{warning}'
        "<h3>Size of each LoRA's contribution</h3>"
        + charts.lines(found.sizes, "Contribution over the steps")
        + charts.legend(found.names)
    )


def findings_html(studio: Studio, order: Order) -> str:
    """What the doctor found, advice first."""
    report = diagnosis(studio, order)
    advice = "".join(
        f"<li><b>{escape(item.topic)}:</b> {escape(item.do)}"
        f"<small>because {escape(item.because)}</small></li>"
        for item in report.advice
    )
    rows = "".join(
        f"<tr><td>{escape(' / '.join(pair['loras']))}</td>"
        f'<td class="n">{pair["cosine"]:+.3f}</td>'
        f'<td class="n">{pair["shared_directions"]:.0%}</td>'
        f'<td class="n">{pair["stacking"]:.2f}</td></tr>'
        for pair in report.pairs()
    )
    table = (
        '<div class="wide"><table class="plain"><thead><tr><th>Pair</th><th class="n">cosine</th>'
        '<th class="n">shared directions</th><th class="n">strength of the sum</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        if rows
        else ""
    )
    head = message(f"For {report.family}; from the files alone.")
    return f'{head}<ul class="advice">{advice}</ul>{table}'
