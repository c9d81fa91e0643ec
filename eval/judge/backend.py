"""Who is asked: a conversation of texts and pictures goes in, a text comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from PIL import Image


@dataclass(frozen=True)
class Turn:
    """Something said.

    Args:
        role: by whom.
        text: what.
        images: pictures shown with it, in this order, before the text.
    """

    role: Literal["user", "assistant"]
    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What came back.

    Args:
        text: as it is.
        tokens_in: tokens read, pictures included, if known.
        tokens_out: tokens written, if known.
        cost: in the currency of the prices, if there are any.
    """

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0


class Backend(Protocol):
    """A model that can be asked."""

    @property
    def name(self) -> str:
        """Identifies the model in records; verdicts of different names are never mixed."""

    def ask(self, turns: Sequence[Turn]) -> Answer:
        """The model's next turn.

        Raises:
            CmloraError: if it cannot be asked at all.
        """
