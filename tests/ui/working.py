"""Orders for the tiny model, and what comes of them."""

from collections.abc import Iterator
from typing import Any

from cmlora.ui.actions import Picture, generate
from cmlora.ui.jobs import Event, Progress, Result, Ticket
from cmlora.ui.order import Order
from cmlora.ui.studio import Studio


def order(**changes: Any) -> Order:
    """A small order for two LoRAs."""
    return Order(
        **{
            "model": "tiny",
            "prompt": "the cat, the hat",
            "loras": {"cat": 1.0, "hat": 0.8},
            "steps": 3,
            "seed": 7,
            **changes,
        }
    )


def pictures(events: Iterator[Event]) -> list[Picture]:
    """The pictures among the events."""
    return [event.value for event in events if isinstance(event, Result)]


def progress(events: Iterator[Event]) -> list[Progress]:
    """The progress among the events."""
    return [event for event in events if isinstance(event, Progress)]


def made(studio: Studio, **changes: Any) -> list[Picture]:
    """The pictures of an order."""
    return pictures(generate(studio, order(**changes), Ticket()))
