"""A report as one HTML file that needs nothing else: no script, nothing from outside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from cmlora.eval.manifest import set_id
from cmlora.eval.report.gallery import Shelf, data_uri, recipe_text, shelf_name, uri_of
from cmlora.eval.report.summary import Summary
from cmlora.eval.report.tables import Table
from cmlora.eval.study import Record, Study
from cmlora.pipelines.models import EMBEDDED

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ddd; }
h3 { font-size: 1em; margin: 1.4em 0 .4em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto; }
th, td { padding: .25em .55em; text-align: right; border-bottom: 1px solid #e4e4e4;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #888; }
code { font-size: .88em; } .note { color: #555; font-size: .9em; }
.plots { display: flex; flex-wrap: wrap; gap: 1em; } svg { max-width: 100%; height: auto; }
.shelf { display: flex; flex-wrap: wrap; gap: .6em; }
figure { margin: 0; width: 160px; } figure img { width: 160px; image-rendering: auto; }
figure.small img { image-rendering: pixelated; }
figcaption { font-size: .8em; overflow-wrap: anywhere; line-height: 1.35; }
.ci { font-size: .82em; color: #666; font-weight: normal; }
pre { font-size: .7em; max-width: 60em; overflow-x: auto; }
summary { cursor: pointer; color: #06c; }
"""


def page(
    title: str,
    sections: Sequence[tuple[str, Sequence[str | Table]]],
    study: Study,
    summary: Summary,
    gallery: Sequence[Shelf],
) -> str:
    """The whole page.

    Args:
        title: of the page.
        sections: heading, and its parts: tables, SVG, or paragraphs with Markdown's code marks.
        study: where the pictures are.
        summary: what is known of them.
        gallery: what to show of them.

    Returns:
        HTML.
    """
    body = [f"<h1>{_inline(title)}</h1>"]
    for heading, parts in sections:
        body.append(f"<h2>{_inline(heading)}</h2>")
        drawn = [part for part in parts if isinstance(part, str) and part.startswith("<svg")]
        for part in parts:
            if isinstance(part, Table):
                body.append(table_html(part))
            elif part not in drawn:
                body.append(f"<p>{_inline(part)}</p>")
        if drawn:
            body.append(f'<div class="plots">{"".join(drawn)}</div>')
    if gallery:
        body.append("<h2>Pictures</h2>")
        manifest = study.manifest
        for shelf in gallery:
            body.append(f"<h3>{escape(shelf_name(shelf))}</h3>")
            body.append(f'<p class="note">{escape(manifest.prompt_of(shelf.ids))}</p>')
            body.append(_shelf(study, summary, shelf))
    inside = "\n".join(body)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_plain(title))}</title><style>{_STYLE}</style></head>\n"
        f"<body>{inside}</body></html>\n"
    )


def table_html(table: Table) -> str:
    """A table with its title and note."""
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in table.head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{_inline(table.note)}</p>' if table.note else ""
    return (
        f"<h3>{_inline(table.title)}</h3><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table>{note}"
    )


def _shelf(study: Study, summary: Summary, shelf: Shelf) -> str:
    figures = [_truth(shelf)] if study.manifest.model == EMBEDDED else []
    for record in shelf.records:
        path = study.folder / record.image
        uri = data_uri(path)
        small = ' class="small"' if uri.startswith("data:image/png") else ""
        cost = "" if record.macs is None else f", {record.macs / 1e9:.3g} GMACs"
        figures.append(
            f'<figure{small}><img src="{uri}" alt="{escape(record.label, quote=True)}">'
            f"<figcaption>{escape(record.label)}<br>{_found(summary, record)}"
            f"{record.seconds:.2f} s{cost}"
            f"<details><summary>recipe</summary><pre>{escape(recipe_text(path))}</pre></details>"
            "</figcaption></figure>"
        )
    return f'<div class="shelf">{"".join(figures)}</div>'


def _truth(shelf: Shelf) -> str:
    """A drawing of what the embedded world's picture should show, in any arrangement."""
    from cmlora.emoji.scenes import render, scene_of

    drawn = Image.fromarray(render(scene_of(shelf.ids), np.random.default_rng(shelf.seed)))
    return (
        f'<figure class="small"><img src="{uri_of(drawn)}" alt="what was asked for">'
        "<figcaption>what was asked for,<br>drawn by the world itself</figcaption></figure>"
    )


def _found(summary: Summary, record: Record) -> str:
    """How many of the concepts are in a picture, if a probe has looked."""
    marks = summary.concepts.get("instance", {}).get(record.label, {})
    place = (set_id(record.ids), record.seed)
    seen = [marks[id_][place] for id_ in record.ids if place in marks.get(id_, {})]
    return f"{sum(mark >= 0.5 for mark in seen)} of {len(seen)} found<br>" if seen else ""


def _inline(text: str) -> str:
    """Text with Markdown's code and bold marks as HTML."""
    found = escape(text)
    found = re.sub(r"(?<=\d) (\[[-+\d.]+, [-+\d.]+\])", r' <span class="ci">\1</span>', found)
    found = re.sub(r"`([^`]+)`", r"<code>\1</code>", found)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", found)


def _plain(text: str) -> str:
    return re.sub(r"[`*]", "", text)
