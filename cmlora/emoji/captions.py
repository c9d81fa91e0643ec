"""Captions of scenes: sentences and tag lists, by name, by attribute and class, or both.

The base model must understand a held-out trigger ("zorbo, brown bird") without having seen it. So
its captions use class words and attributes beside or instead of names, and now and then a made-up
name that means nothing, which teaches it to read past names it does not know.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cmlora.emoji.scenes import Scene
from cmlora.emoji.world import CATEGORIES, CONCEPTS, Element

Rng = np.random.Generator
NAME, DESCRIPTION, BOTH, MADE_UP, CLASS = 0.4, 0.18, 0.2, 0.17, 0.05
"""How often an element is called by its name ("fox"), described ("orange dog"), both, described
behind a made-up name ("kalun, orange dog"), or called by its class alone ("dog")."""

_ONSETS = (*"bdfgklmnprstvz", "br", "dr", "gl", "kr", "pl", "tr", "st")
_VOWELS = "aeiou"
_CODAS = ["", "", "n", "l", "x", "m", "sk"]
_RESERVED = {e.word for e in CONCEPTS}
_PLACES = {
    "beach": "on a beach",
    "desert": "in a desert",
    "snow": "in the snow",
    "meadow": "in a meadow",
    "pine forest": "in a pine forest",
    "oak forest": "in an oak forest",
    "starry night": "under a starry night",
    "city night": "in a city night",
}
_SHOTS = ("picture", "drawing", "image")


def made_up_word(rng: Rng) -> str:
    """A pronounceable word without meaning, never one of the trigger words."""
    while True:
        parts = [
            _ONSETS[int(rng.integers(len(_ONSETS)))] + _VOWELS[int(rng.integers(len(_VOWELS)))]
            for _ in range(2)
        ]
        word = "".join(parts) + _CODAS[int(rng.integers(len(_CODAS)))]
        if word not in _RESERVED:
            return word


def article(noun: str) -> str:
    """ "an owl", "a fox"; names of places and plurals keep their form."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def mention(element: Element, rng: Rng) -> str:
    """One way to call an element; a held-out one is always called by its trigger text."""
    if element.word:
        return element.trigger
    kind = int(rng.choice(5, p=(NAME, DESCRIPTION, BOTH, MADE_UP, CLASS)))
    return (
        element.name,
        element.description,
        f"{element.name}, {element.description}",
        f"{made_up_word(rng)}, {element.description}",
        element.kind,
    )[kind]


def tags(scene: Scene, rng: Rng) -> str:
    """A comma-separated list of mentions in random order: "bow, red ribbon, fox, beach"."""
    mentions = [mention(e, rng) for e in scene.elements()]
    rng.shuffle(mentions)
    return ", ".join(mentions)


def sentence(scene: Scene, rng: Rng, call: Callable[[Element, Rng], str] = mention) -> str:
    """A grammatical caption: "a sketch of a fox in a top hat holding a pear on a beach".

    Args:
        scene: the elements.
        rng: chooses the turns of phrase.
        call: how an element is called; by default one of many ways at random.
    """
    words = {c: call(e, rng) for c in CATEGORIES if (e := getattr(scene, c)) is not None}
    subject: list[str] = []
    if "character" in words:
        subject.append(article(words["character"]))
        if "clothing" in words:
            subject.append(
                f"{('in', 'wearing', 'with')[int(rng.integers(3))]} {article(words['clothing'])}"
            )
        if "object" in words:
            subject.append(
                f"{('holding', 'with', 'and')[int(rng.integers(3))]} {article(words['object'])}"
            )
    elif "object" in words:
        subject.append(article(words["object"]))
    else:
        subject.append("a scene")
    if "background" in words:
        subject.append(_place(scene, words["background"], rng))
    text = " ".join(subject)
    if "style" in words:
        text = (
            f"{article(words['style'])} of {text}"
            if rng.random() < 0.7
            else f"{text}, {words['style']}"
        )
    elif rng.random() < 0.15:
        text = f"{article(_SHOTS[int(rng.integers(3))])} of {text}"
    return text


def _place(scene: Scene, words: str, rng: Rng) -> str:
    assert scene.background is not None
    if words == scene.background.name:
        return _PLACES.get(words, f"in {article(words)}")
    return f"{('in', 'before', 'on')[int(rng.integers(3))]} {article(words)}"


def caption(scene: Scene, rng: Rng) -> str:
    """A random caption, a sentence or a tag list with equal chance."""
    return sentence(scene, rng) if rng.random() < 0.5 else tags(scene, rng)


def prompt(concepts: tuple[Element, ...]) -> str:
    """The testbed's prompt: all trigger texts, comma-separated, in the order given."""
    return ", ".join(e.trigger for e in concepts)
