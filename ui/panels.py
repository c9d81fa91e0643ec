"""Pieces of the page as HTML. Everything that comes from outside is escaped here."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cmlora.recipe import Recipe
from cmlora.strategies import METHODS
from cmlora.strategies.options import defaults
from cmlora.ui.actions import Picture
from cmlora.ui.cards import Card
from cmlora.ui.jobs import Progress

STRENGTH = 2.0
"""The strongest that the sliders go; prompts and the API may ask for more."""


def duration(seconds: float | None) -> str:
    """Seconds as people say them.

    >>> duration(0.42), duration(12.4), duration(95), duration(7300), duration(None)
    ('0.4 s', '12 s', '1 min 35 s', '2 h 1 min', '')
    """
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def stage(
    image: str = "", *, words: str = "", share: float | None = None, kind: str = "idle"
) -> str:
    """The place where a picture comes into being; its size never changes.

    Args:
        image: a ``data:`` address.
        words: below the bar.
        share: of the work that is done; ``None`` has no bar.
        kind: ``idle``, ``busy``, ``done`` or ``error``.
    """
    inner = f'<img src="{image}" alt="{"Preview" if kind == "busy" else "Picture"}">'
    if not image:
        inner = f'<p class="hint">{_HINTS.get(kind, "")}</p>'
    role = 'role="alert"' if kind == "error" else 'role="status" aria-live="polite"'
    value = round(100 * (share or 0.0))
    bar = (
        f'<div class="bar" role="progressbar" aria-label="Progress" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{value}"><i style="width:{value}%"></i></div>'
    )
    return (
        f'<div class="stage {kind}"><div class="frame">{inner}</div>{bar}'
        f'<p class="words" {role}>{escape(words) or "&nbsp;"}</p></div>'
    )


_HINTS = {
    "idle": "Select LoRAs, say what to draw, and press Generate.",
    "busy": "The preview appears with the first step.",
    "error": "No picture this time.",
}


def busy(progress: Progress) -> str:
    """The stage while work goes on."""
    left = f"{duration(progress.seconds_left)} left" if progress.seconds_left is not None else ""
    words = " · ".join(filter(None, (progress.words, left)))
    return stage(progress.preview, words=words, share=progress.share, kind="busy")


def summary(picture: Picture) -> str:
    """What making a picture took, in one line."""
    report = picture.report
    full, light = sum(report.full.values()), sum(report.light.values())
    parts = [duration(report.seconds), f"{full:g} full passes"]
    if light:
        parts.append(f"{light:g} light")
    if picture.macs is not None:
        parts.append(macs(picture.macs))
    return " · ".join(parts)


def macs(count: float) -> str:
    """Multiply-accumulates in the unit that fits.

    >>> macs(3.2e12), macs(51e9), macs(7e6)
    ('3.2 TMACs', '51 GMACs', '7 MMACs')
    """
    for size, unit in ((1e12, "TMACs"), (1e9, "GMACs")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e6:.3g} MMACs"


def recipe_panel(recipe: Recipe, took: str = "") -> str:
    """A recipe as a person reads it, with its JSON to copy."""
    loras = [
        f"<li><b>{escape(lora.name)}</b> <span>{lora.weight:g}</span>"
        f"{_frequency(lora.frequency)}</li>"
        for lora in recipe.loras
    ]
    options = "; ".join(f"{key}={value}" for key, value in recipe.options.items())
    rows = {
        "Prompt": escape(recipe.prompt),
        "Negative": escape(recipe.negative_prompt),
        "LoRAs": f"<ul>{''.join(loras)}</ul>" if loras else "none",
        "Method": escape(" ".join(filter(None, (recipe.method, options)))),
        "Cache": escape(recipe.cache if recipe.cache != "none" else ""),
        "Sampler": escape(f"{recipe.scheduler.removesuffix('Scheduler')}, {recipe.steps} steps"),
        "Guidance": f"{recipe.guidance_scale:g}",
        "Size": f"{recipe.width} x {recipe.height}",
        "Seed": f"{recipe.seed}" + (f", picture {recipe.index + 1}" if recipe.index else ""),
        "Model": f"{escape(recipe.model)} <small>{escape(recipe.model_hash[:10])}</small>",
        "Took": escape(took),
    }
    body = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in rows.items() if value)
    text = escape(json.dumps(json.loads(recipe.to_json()), indent=1, ensure_ascii=False))
    return (
        f'<section class="recipe" aria-label="Recipe"><dl>{body}</dl>'
        f"<details><summary>Recipe as JSON</summary><pre>{text}</pre></details></section>"
    )


def _frequency(value: float | None) -> str:
    return "" if value is None else f" <small>high-frequency share {value:.2f}</small>"


def lora_list(cards: Sequence[Card], chosen: Mapping[str, float]) -> str:
    """The LoRAs with a switch and a strength each; ``assets/page.js`` reads them."""
    if not cards:
        return (
            '<p class="hint">No LoRA files here yet. Start with <code>--loras FOLDER</code>, '
            "or add a file below.</p>"
        )
    search = (
        '<input class="find" type="search" placeholder="Find a LoRA" aria-label="Find a LoRA">'
        if len(cards) > 6
        else ""
    )
    rows = "".join(_lora_row(card, chosen.get(card.name)) for card in cards)
    return f'{search}<ul class="loras" aria-label="LoRAs">{rows}</ul>'


def _lora_row(card: Card, weight: float | None) -> str:
    name, short = escape(card.name, quote=True), escape(card.short, quote=True)
    if card.problem:
        return (
            f'<li class="lora broken" data-name="{name}"><span class="pick">'
            f'<span class="box" aria-hidden="true">!</span>'
            f'<img class="thumb" src="{card.thumbnail}" alt=""><span class="who"><b>{short}</b>'
            f"<small>{escape(card.problem)}</small></span></span></li>"
        )
    facts = [card.family, f"rank {card.rank}" if card.rank else "", _size(card.bytes)]
    words = ", ".join(card.triggers[:3])
    trigger = f'<small class="triggers">{escape(words)}</small>' if words else ""
    value = 1.0 if weight is None else weight
    on = weight is not None
    return (
        f'<li class="lora{" on" if on else ""}" data-name="{name}">'
        f'<label class="pick"><input type="checkbox" {"checked" if on else ""} '
        f'aria-label="Use {short}"><img class="thumb" src="{card.thumbnail}" alt="">'
        f'<span class="who"><b title="{name}">{short}</b>'
        f"<small>{escape(' · '.join(filter(None, facts)))}</small>{trigger}</span></label>"
        f'<div class="strength"><input type="range" min="0" max="{STRENGTH:g}" step="0.05" '
        f'value="{value:g}" aria-label="Strength of {short}" {"" if on else "disabled"}>'
        f"<output>{value:.2f}</output></div></li>"
    )


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MB" if count >= 2**20 else f"{max(1, count // 2**10)} KB"


def method_note(method: str) -> str:
    """One line about a method, and the options it has."""
    entry = METHODS[method]
    options = defaults(entry.object)
    listed = ", ".join(f"<code>{escape(k)}={escape(_plain(v))}</code>" for k, v in options.items())
    paper = f" <small>{escape(entry.paper)}</small>" if entry.paper else ""
    tail = f"<details><summary>Options</summary>{listed}</details>" if listed else ""
    sentence = entry.sentence[0].upper() + entry.sentence[1:]
    return f'<div class="note"><p>{escape(sentence)}.{paper}</p>{tail}</div>'


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def message(words: str, kind: str = "note") -> str:
    """A line of text; ``kind`` is ``note`` or ``error``."""
    role = ' role="alert"' if kind == "error" else ""
    return f'<p class="{kind}"{role}>{escape(words) or "&nbsp;"}</p>'
