"""What the emoji world consists of: elements by category, their classes, attributes and triggers.

This file is data. README.md beside it says why the world is the way it is. Eleven elements are
held out of the base model's training set; they exist as LoRAs only.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

Category = Literal["character", "clothing", "style", "background", "object"]
CATEGORIES: tuple[Category, ...] = ("character", "clothing", "style", "background", "object")
SIZE = 64
"""Height and width of every picture, in pixels."""


@dataclass(frozen=True)
class Element:
    """One thing that can be in a picture.

    Args:
        name: its plain name, as captions use it ("fox", "top hat", "sketch").
        category: which of the five slots of a scene it fills.
        kind: the class word it shares with others ("dog", "hat", "line drawing").
        attribute: the words that single it out within its class ("orange").
        codepoint: the emoji that draws it; ``None`` for backgrounds and styles, which are code.
        head: where headwear sits on a character, as fractions (x, y) of its own box.
        concept: id of the LoRA that carries it ("character_1"), or ``None`` if the base knows it.
        word: the made-up name that triggers the LoRA; empty if the base knows the element.
    """

    name: str
    category: Category
    kind: str
    attribute: str
    codepoint: int | None = None
    head: tuple[float, float] = (0.5, 0.1)
    concept: str | None = None
    word: str = ""

    @property
    def description(self) -> str:
        """Attribute and class: what the base model can make of a trigger text."""
        return f"{self.attribute} {self.kind}".strip()

    @property
    def trigger(self) -> str:
        """The trigger text of a held-out element ("zorbo, brown bird"), else its name."""
        return f"{self.word}, {self.description}" if self.word else self.name


def _character(
    name: str, kind: str, attribute: str, codepoint: int, head: tuple[float, float] = (0.5, 0.1)
) -> Element:
    return Element(name, "character", kind, attribute, codepoint, head)


def _known(category: Category, *rows: tuple[str, str, str, int | None]) -> tuple[Element, ...]:
    return tuple(Element(name, category, kind, attr, code) for name, kind, attr, code in rows)


CHARACTERS = (
    _character("puppy", "dog", "spotted", 0x1F436),
    _character("wolf", "dog", "grey", 0x1F43A, (0.5, 0.16)),
    _character("fox", "dog", "orange", 0x1F98A, (0.5, 0.18)),
    _character("kitten", "cat", "yellow", 0x1F431, (0.5, 0.16)),
    _character("lion", "cat", "maned", 0x1F981, (0.5, 0.08)),
    _character("tiger", "cat", "striped", 0x1F42F),
    _character("grizzly", "bear", "brown", 0x1F43B),
    _character("koala", "bear", "grey", 0x1F428, (0.5, 0.14)),
    _character("teddy", "bear", "golden", 0x1F9F8, (0.5, 0.06)),
    _character("chicken", "bird", "white", 0x1F414, (0.4, 0.1)),
    _character("penguin", "bird", "black", 0x1F427, (0.5, 0.04)),
    _character("bluebird", "bird", "blue", 0x1F426, (0.36, 0.18)),
    _character("duck", "bird", "green", 0x1F986, (0.28, 0.08)),
    _character("chick", "bird", "yellow", 0x1F424, (0.36, 0.14)),
    _character("cow", "farm animal", "spotted", 0x1F42E, (0.5, 0.12)),
    _character("pig", "farm animal", "pink", 0x1F437),
    _character("mouse", "rodent", "grey", 0x1F42D, (0.5, 0.2)),
    _character("hamster", "rodent", "orange", 0x1F439),
    _character("rabbit", "rodent", "white", 0x1F430, (0.5, 0.36)),
    _character("monkey", "jungle animal", "brown", 0x1F435),
    _character("frog", "jungle animal", "green", 0x1F438, (0.5, 0.18)),
    _character("ghost", "monster", "white", 0x1F47B, (0.42, 0.04)),
    _character("alien", "monster", "grey", 0x1F47D, (0.5, 0.04)),
    _character("ogre", "monster", "red", 0x1F479, (0.5, 0.14)),
)

CLOTHING = _known(
    "clothing",
    ("top hat", "hat", "black", 0x1F3A9),
    ("cap", "hat", "blue", 0x1F9E2),
    ("sun hat", "hat", "yellow", 0x1F452),
    ("rescue helmet", "helmet", "red", 0x26D1),
    ("army helmet", "helmet", "green", 0x1FA96),
    ("bow", "ribbon", "red", 0x1F380),
)

STYLES = _known(
    "style",
    ("sketch", "line drawing", "pencil", None),
    ("blueprint", "line drawing", "blue", None),
    ("neon", "line drawing", "glowing", None),
    ("sepia", "tinted photo", "brown", None),
    ("noir", "tinted photo", "grey", None),
)

BACKGROUNDS = _known(
    "background",
    ("beach", "sand", "seaside", None),
    ("desert", "sand", "dry", None),
    ("snow", "field", "white", None),
    ("meadow", "field", "green", None),
    ("pine forest", "forest", "dark", None),
    ("oak forest", "forest", "bright", None),
    ("starry night", "dark sky", "starry", None),
    ("city night", "dark sky", "city", None),
)

OBJECTS = _known(
    "object",
    ("apple", "fruit", "red", 0x1F34E),
    ("banana", "fruit", "long", 0x1F34C),
    ("pear", "fruit", "green", 0x1F350),
    ("grapes", "fruit", "purple", 0x1F347),
    ("strawberry", "fruit", "dotted", 0x1F353),
    ("burger", "snack", "round", 0x1F354),
    ("pizza", "snack", "flat", 0x1F355),
    ("donut", "snack", "brown", 0x1F369),
    ("ice cream", "snack", "white", 0x1F366),
    ("car", "vehicle", "red", 0x1F697),
    ("bus", "vehicle", "blue", 0x1F68C),
    ("rocket", "vehicle", "flying", 0x1F680),
    ("scooter", "vehicle", "yellow", 0x1F6F5),
    ("tulip", "flower", "pink", 0x1F337),
    ("sunflower", "flower", "yellow", 0x1F33B),
    ("rose", "flower", "red", 0x1F339),
    ("football", "ball", "white", 0x26BD),
    ("basketball", "ball", "orange", 0x1F3C0),
    ("balloon", "party thing", "red", 0x1F388),
    ("gift", "party thing", "golden", 0x1F381),
)


def _held_out(
    concept: str,
    name: str,
    kind: str,
    attribute: str,
    word: str,
    codepoint: int | None = None,
    head: tuple[float, float] = (0.5, 0.1),
) -> Element:
    category = next(c for c in CATEGORIES if concept.startswith(c))
    return Element(name, category, kind, attribute, codepoint, head, concept, word)


CONCEPTS = (
    _held_out("character_1", "owl", "bird", "brown", "zorbo", 0x1F989, (0.5, 0.06)),
    _held_out("character_2", "panda", "bear", "black and white", "minku", 0x1F43C),
    _held_out("character_3", "robot", "monster", "blue", "vexol", 0x1F916, (0.5, 0.1)),
    _held_out("clothing_1", "crown", "hat", "golden", "krayo", 0x1F451),
    _held_out("clothing_2", "graduation cap", "hat", "flat black", "tufim", 0x1F393),
    _held_out("style_1", "chalk", "line drawing", "white", "druma"),
    _held_out("style_2", "sunset tint", "tinted photo", "purple", "vindy"),
    _held_out("background_1", "bamboo grove", "forest", "tall", "yelta"),
    _held_out("background_2", "aurora", "dark sky", "colourful", "noqua"),
    _held_out("object_1", "pineapple", "fruit", "yellow", "pynta", 0x1F34D),
    _held_out("object_2", "tractor", "vehicle", "green and yellow", "gorlo", 0x1F69C),
)
"""The eleven elements that the base model has never seen, one LoRA each."""

KNOWN: dict[Category, tuple[Element, ...]] = {
    "character": CHARACTERS,
    "clothing": CLOTHING,
    "style": STYLES,
    "background": BACKGROUNDS,
    "object": OBJECTS,
}
"""What the base model is trained on."""

ELEMENTS: dict[Category, tuple[Element, ...]] = {
    category: (*KNOWN[category], *(e for e in CONCEPTS if e.category == category))
    for category in CATEGORIES
}
"""Everything, held-out concepts last; the order of the probe's outputs (after "nothing")."""

BY_CONCEPT = {e.concept: e for e in CONCEPTS if e.concept is not None}


def sets(size: int) -> list[tuple[str, ...]]:
    """All sets of `size` concepts with one character and at most one concept per category.

    Args:
        size: 1 to 5 concepts.

    Returns:
        Tuples of concept ids, categories in the order of `CATEGORIES`: 24, 72, 96 and 48 sets
        for sizes 2, 3, 4 and 5.
    """
    by_category = {
        c: [e.concept for e in CONCEPTS if e.category == c and e.concept] for c in CATEGORIES
    }
    return [
        chosen
        for others in combinations(CATEGORIES[1:], size - 1)
        for chosen in product(*(by_category[c] for c in ("character", *others)))
    ]
