"""What the sections of the Zoo tab share: how work is followed and its results are shown."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import gradio as gr

from cmlora.ui.cards import cards
from cmlora.ui.forms import read_selection
from cmlora.ui.jobs import Event, Progress, Ticket
from cmlora.ui.panels import busy, lora_list, message
from cmlora.ui.rail import Rail
from cmlora.ui.studio import Studio
from cmlora.ui.tab_compare import compact
from cmlora.ui.tab_generate import PIPELINE, visitor
from cmlora.ui.talk import sentence
from cmlora.ui.writing import Made

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of events that answer at once."""

RUNNING: dict[str, Any] = {
    "api_visibility": "private",
    "show_progress": "minimal",
    "concurrency_id": PIPELINE,
    "concurrency_limit": 1,
}
"""Of events that take their turn in the queue."""


@dataclass(frozen=True)
class Bench:
    """What every section needs of the page.

    Args:
        studio: the server's.
        rail: model and selection.
        which: the list of single LoRAs, which new files join.
    """

    studio: Studio
    rail: Rail
    which: gr.Dropdown

    @property
    def results(self) -> list[Any]:
        """The lists that a new file changes."""
        return [self.rail.listing, self.which]

    def follow(
        self,
        start: Callable[[Ticket], Iterator[Event] | Made | Sequence[Made]],
        model: str,
        text: str,
        request: gr.Request,
    ) -> Iterator[list[Any]]:
        """Outputs while files are made: what is said, the list of LoRAs, the list of single ones.

        Args:
            start: begins the work; files, or events on the way to them.
            model: that is selected.
            text: the selection.
            request: whose work it is.
        """
        try:
            with self.studio.tickets.take(visitor(request)) as ticket:
                found = start(ticket)
                if not isinstance(found, Iterator):
                    yield self._finished(found, model, text)
                    return
                for event in found:
                    if isinstance(event, Progress):
                        yield [compact(busy(replace(event, preview=""))), gr.skip(), gr.skip()]
                    else:
                        yield self._finished(event.value, model, text)
        except Exception as error:
            yield [message(sentence(error), "error"), gr.skip(), gr.skip()]

    def _finished(self, found: Any, model: str, text: str) -> list[Any]:
        made: list[Made] = [found] if isinstance(found, Made) else list(found)
        listing = lora_list(cards(self.studio, model), read_selection(text))
        said = "".join(made_html(each, self.studio) for each in made)
        return [said, listing, gr.Dropdown(choices=list(self.studio.lora_paths(model)))]


def made_html(made: Made, studio: Studio) -> str:
    """What was made and what is to be said about it."""
    among = "is among the LoRAs now" if made.path.parent == studio.uploads else "is kept"
    return message(f"{made.name} {among}.") + facts_html(made.facts)


def facts_html(facts: Mapping[str, str]) -> str:
    """Facts by title as a table."""
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in facts.items()
    )
    return f'<div class="wide"><table class="plain facts"><tbody>{rows}</tbody></table></div>'


def method_html(
    sentence_: str, paper: str = "", options: Mapping[str, Any] | None = None, needs: str = ""
) -> str:
    """A method in a line, its options, and what it still needs."""
    said = escape(f"{sentence_[0].upper()}{sentence_[1:]}")
    source = f" <small>{escape(paper)}</small>" if paper else ""
    listed = ", ".join(
        f"<code>{escape(k)}={escape(str(v))}</code>" for k, v in (options or {}).items()
    )
    tail = f"<br><small>Options: {listed}</small>" if listed else ""
    told = f'<br><b class="needs">{escape(needs[0].upper() + needs[1:])}.</b>' if needs else ""
    return f'<p class="note">{said}.{source}{tail}{told}</p>'


def needs_html(sentence_: str, needs: str) -> str:
    """What a section does, and what it still needs."""
    return method_html(sentence_, needs=needs)
