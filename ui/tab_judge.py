"""The Judge tab: two pictures, one decision, and where the methods stand."""

from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from cmlora.ui import charts
from cmlora.ui.arena import Choice, Duel, Vote, duels, entries, export, runs, standings
from cmlora.ui.comparing import FOLDER
from cmlora.ui.panels import message
from cmlora.ui.previews import data_uri
from cmlora.ui.studio import Studio
from cmlora.ui.talk import sentence


def build(studio: Studio, done: gr.State) -> None:
    """Draw the tab and wire it.

    Args:
        studio: the server's.
        done: changes when a comparison is finished.
    """
    with gr.Row():
        run = gr.Dropdown(runs(studio), label="Comparison", value=None, elem_id="run", scale=3)
        rater = gr.Textbox("me", label="Your name in the export", elem_id="rater", scale=1)
        begin = gr.Button("Begin", variant="primary", elem_id="begin", scale=0, min_width=120)
    said = gr.HTML(
        message("Pairs from one column of a comparison, names hidden. Which one is better?"),
        elem_id="judge-said",
    )
    board = gr.HTML(duel_html(studio, "", None), elem_id="duel")
    with gr.Row(elem_classes="ballot"):
        left = gr.Button("← Left", interactive=False, min_width=70, elem_id="vote-left")
        tie = gr.Button("↓ Equal", interactive=False, min_width=70, elem_id="vote-tie")
        right = gr.Button("Right →", interactive=False, min_width=70, elem_id="vote-right")
        skip = gr.Button("Skip", interactive=False, min_width=70, elem_id="vote-skip")
    with gr.Row():
        show = gr.Button(
            "Show standings", interactive=False, min_width=140, elem_id="standings-show"
        )
        save = gr.DownloadButton(
            "Export votes", interactive=False, min_width=140, elem_id="export-votes"
        )
    table = gr.HTML(elem_id="standings")
    waiting, votes, current = gr.State([]), gr.State([]), gr.State("")

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    ballots = [left, tie, right, skip]

    def on_begin(name: str | None) -> list[Any]:
        try:
            found = duels(entries(studio, name), seed=len(runs(studio)))
        except Exception as error:
            return [[], [], "", gr.skip(), message(sentence(error), "error"), *_ballots(False), ""]
        if not found:
            words = message("This comparison has no two pictures of one column.", "error")
            return [[], [], "", gr.skip(), words, *_ballots(False), ""]
        words = message(f"Pair 1 of {len(found)}")
        return [
            found,
            [],
            name,
            duel_html(studio, name or "", found[0]),
            words,
            *_ballots(True),
            "",
        ]

    def on_vote(
        choice: Choice | None, todo: list[Duel], cast: list[Vote], name: str, who: str
    ) -> list[Any]:
        if not todo:
            return [todo, cast, gr.skip(), gr.skip(), *_ballots(False, bool(cast))]
        first, rest = todo[0], todo[1:]
        cast = [*cast, Vote(first, choice)] if choice else cast
        words = f"{len(cast)} votes, {len(rest)} pairs left"
        if not rest:
            words = f"All pairs are judged, {len(cast)} votes. Show the standings below."
        board = duel_html(studio, name, rest[0] if rest else None)
        ballots = _ballots(bool(rest), bool(cast))
        try:
            ballots[-1] = _exported(studio, cast, name, who)
        except Exception as error:
            return [rest, cast, board, message(sentence(error), "error"), *ballots]
        return [rest, cast, board, message(words), *ballots]

    def on_show(cast: list[Vote]) -> str:
        return standings_html(cast)

    def on_rename(cast: list[Vote], name: str, who: str) -> Any:
        return _exported(studio, cast, name, who)

    begin.click(
        on_begin, run, [waiting, votes, current, board, said, *ballots, show, save, table], **quiet
    )
    for button, choice in ((left, "left"), (tie, "tie"), (right, "right"), (skip, None)):
        button.click(
            lambda todo, cast, name, who, choice=choice: on_vote(choice, todo, cast, name, who),
            [waiting, votes, current, rater],
            [waiting, votes, board, said, *ballots, show, save],
            **quiet,
        )
    show.click(on_show, votes, table, **quiet)
    rater.change(on_rename, [votes, current, rater], save, **quiet)
    done.change(
        lambda name: gr.Dropdown(choices=runs(studio), value=name or None), done, run, **quiet
    )


def _exported(studio: Studio, cast: list[Vote], name: str, who: str) -> Any:
    """The export button with the votes so far behind it."""
    if not cast:
        return gr.DownloadButton(interactive=False)
    path = export(studio, name, cast, who or "somebody")
    return gr.DownloadButton(value=str(path), interactive=True)


def _ballots(open_: bool, finished: bool | None = None) -> list[Any]:
    """The four ballots, and the two buttons for what has been decided."""
    later = open_ if finished is None else finished
    return [gr.Button(interactive=open_)] * 4 + [
        gr.Button(interactive=later),
        gr.DownloadButton(interactive=later),
    ]


def duel_html(studio: Studio, run: str, duel: Duel | None) -> str:
    """Two pictures side by side; who made them is not in the page."""
    if duel is None:
        empty = '<figure><div class="pic"><p class="hint">{}</p></div></figure>'
        first = empty.format("Choose a comparison and begin.")
        return f'<div class="duel">{first}{empty.format("")}</div>'
    sides = []
    for side, entry in (("Left", duel.left), ("Right", duel.right)):
        with Image.open(studio.settings.out / FOLDER / run / entry.id) as image:
            source = data_uri(image, 768)
        sides.append(
            f'<figure><div class="pic"><img src="{source}" alt="{side} picture"></div></figure>'
        )
    return f'<div class="duel">{"".join(sides)}</div>'


def standings_html(votes: list[Vote]) -> str:
    """Ratings with their intervals, strongest first."""
    found = standings(votes)
    if not found:
        return message("There are no votes yet.")
    rows = "".join(
        f'<tr><td>{escape(s.name)}</td><td class="n">{s.wins:g} of {s.votes}</td>'
        f'<td class="n">{s.elo:.0f}</td><td class="n">{s.rating:.0f}</td>'
        f'<td class="n">{s.low:.0f} to {s.high:.0f}</td></tr>'
        for s in found
    )
    chart = charts.intervals(
        [(s.name, s.rating, s.low, s.high) for s in found], "Ratings with their intervals"
    )
    return (
        '<div class="wide"><table class="plain"><thead><tr><th>Method</th><th class="n">won</th>'
        '<th class="n">Elo</th><th class="n">Bradley-Terry</th><th class="n">95 % interval</th>'
        f"</tr></thead><tbody>{rows}</tbody></table></div>{chart}"
    )
