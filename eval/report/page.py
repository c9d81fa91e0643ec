"""A report as one HTML file that needs nothing else: no script, nothing from outside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from cmlora.eval.report.gallery import Shelf, data_uri, recipe_text, shelf_name
from cmlora.eval.report.tables import Table
from cmlora.eval.study import Study

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ddd; }
h3 { font-size: 1em; margin: 1.4em 0 .4em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto; }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #e4e4e4;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #888; }
code { font-size: .92em; } .note { color: #555; font-size: .9em; }
.plots { display: flex; flex-wrap: wrap; gap: 1em; } svg { max-width: 100%; height: auto; }
.shelf { display: flex; flex-wrap: wrap; gap: .6em; }
figure { margin: 0; width: 160px; } figure img { width: 160px; image-rendering: auto; }
figure.small img { image-rendering: pixelated; }
figcaption { font-size: .8em; } pre { font-size: .7em; max-width: 60em; overflow-x: auto; }
summary { cursor: pointer; color: #06c; }
"""


def page(
    title: str,
    sections: Sequence[tuple[str, Sequence[str | Table]]],
    study: Study,
    gallery: Sequence[Shelf],
) -> str:
    """The whole page.

    Args:
        title: of the page.
        sections: heading, and its parts: tables, SVG, or paragraphs with Markdown's code marks.
        study: where the pictures are.
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
        body += [_shelf(study, shelf) for shelf in gallery]
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


def _shelf(study: Study, shelf: Shelf) -> str:
    figures = []
    for record in shelf.records:
        path = study.folder / record.image
        uri = data_uri(path)
        small = ' class="small"' if uri.startswith("data:image/png") else ""
        cost = "" if record.macs is None else f", {record.macs / 1e9:.3g} GMACs"
        figures.append(
            f'<figure{small}><img src="{uri}" alt="{escape(record.label, quote=True)}">'
            f"<figcaption>{escape(record.label)}<br>{record.seconds:.2f} s{cost}"
            f"<details><summary>recipe</summary><pre>{escape(recipe_text(path))}</pre></details>"
            "</figcaption></figure>"
        )
    return f'<h3>{escape(shelf_name(shelf))}</h3><div class="shelf">{"".join(figures)}</div>'


def _inline(text: str) -> str:
    """Text with Markdown's code and bold marks as HTML."""
    found = escape(text)
    found = re.sub(r"`([^`]+)`", r"<code>\1</code>", found)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", found)


def _plain(text: str) -> str:
    return re.sub(r"[`*]", "", text)
