"""Scenes, captions and sets of the embedded world."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlora.emoji.captions import article, caption, made_up_word, mention, prompt, sentence, tags
from cmlora.emoji.concepts import context, training_scenes
from cmlora.emoji.dataset import labels_of, scene_of_labels
from cmlora.emoji.scenes import Scene, render, sample, scene_of, sprite_file
from cmlora.emoji.world import BY_CONCEPT, CATEGORIES, CONCEPTS, ELEMENTS, KNOWN, sets

seeds = st.integers(0, 2**31)


def test_sets_are_those_of_the_testbed() -> None:
    assert [len(sets(n)) for n in (2, 3, 4, 5)] == [24, 72, 96, 48]
    for size in (2, 3, 4, 5):
        for chosen in sets(size):
            categories = [BY_CONCEPT[c].category for c in chosen]
            assert categories[0] == "character"
            assert len(set(categories)) == size
            assert categories == sorted(categories, key=CATEGORIES.index)


def test_held_out_concepts_are_never_sampled_for_the_base() -> None:
    held_out = {e.name for e in CONCEPTS}
    seen = {e.name for i in range(2000) for e in sample(np.random.default_rng((4, i))).elements()}
    assert not seen & held_out
    assert seen == {e.name for c in CATEGORIES for e in KNOWN[c]}


def test_every_element_has_classmates_to_be_mistaken_for() -> None:
    for concept in CONCEPTS:
        mates = [e for e in KNOWN[concept.category] if e.kind == concept.kind]
        assert len(mates) >= 2, concept.name


def test_names_are_unique_and_every_sprite_is_there() -> None:
    names = [e.name for c in CATEGORIES for e in ELEMENTS[c]]
    assert len(set(names)) == len(names)
    for category in ("character", "clothing", "object"):
        for element in ELEMENTS[category]:
            assert sprite_file(element.name).is_file(), element.name


@given(seeds)
@settings(deadline=None, max_examples=30)
def test_a_scene_is_determined_by_its_seed(seed: int) -> None:
    def draw() -> np.ndarray:
        rng = np.random.default_rng(seed)
        return render(sample(rng, choices=ELEMENTS), rng)

    first = draw()
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, draw())


@given(seeds)
@settings(deadline=None, max_examples=30)
def test_sampled_scenes_make_sense(seed: int) -> None:
    scene = sample(np.random.default_rng(seed), choices=ELEMENTS)
    assert scene.character is not None or scene.object is not None
    assert scene.clothing is None or scene.character is not None
    assert scene_of_labels(np.array(labels_of(scene))) == scene


@pytest.mark.parametrize("category", CATEGORIES)
def test_each_element_changes_the_picture(category: str) -> None:
    fixed = {"character": KNOWN["character"][0], "background": None, "style": None}
    drawn = []
    for element in (None, *ELEMENTS[category]):  # type: ignore[index]
        scene = Scene(**{**fixed, category: element})
        drawn.append(render(scene, np.random.default_rng(3)).astype(int))
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert np.abs(first - second).mean() > 1


@given(seeds)
@settings(deadline=None, max_examples=30)
def test_captions_mention_every_element_by_name_or_class(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample(rng, choices=ELEMENTS)
    for text in (sentence(scene, rng), tags(scene, rng)):
        for element in scene.elements():
            words = (element.name, element.kind, element.trigger)
            assert any(word in text for word in words), (text, element)


def test_mentions_of_concepts_are_their_triggers() -> None:
    rng = np.random.default_rng(0)
    owl = BY_CONCEPT["character_1"]
    assert {mention(owl, rng) for _ in range(50)} == {"zorbo, brown bird"}
    assert prompt((owl, BY_CONCEPT["clothing_1"])) == "zorbo, brown bird, krayo, golden hat"


def test_made_up_words_are_never_triggers() -> None:
    rng = np.random.default_rng(0)
    words = {made_up_word(rng) for _ in range(5000)}
    assert len(words) > 2000
    assert not words & {e.word for e in CONCEPTS}


def test_captions_read_well() -> None:
    scene = Scene(
        character=KNOWN["character"][2],
        clothing=KNOWN["clothing"][0],
        style=KNOWN["style"][0],
        background=KNOWN["background"][0],
        object=KNOWN["object"][2],
    )
    texts = {
        sentence(scene, np.random.default_rng(i), call=lambda e, _: e.name) for i in range(200)
    }
    assert "a sketch of a fox in a top hat holding a pear on a beach" in texts
    assert article("owl") == "an owl"
    assert "" not in {caption(scene, np.random.default_rng(i)) for i in range(50)}


def test_biased_training_sets_are_narrow_and_unbiased_ones_are_not() -> None:
    for concept in BY_CONCEPT:
        element = BY_CONCEPT[concept]
        narrow = [s for s, _ in training_scenes(concept, "biased")]
        assert len(narrow) == 32
        assert all(getattr(s, element.category) is element for s in narrow)
        places = {s.background.name for s in narrow if s.background}
        styles = {s.style.name for s in narrow if s.style}
        assert places <= {e.name for e in (*context(concept, "biased")["background"], element)}
        assert styles <= {element.name}
        wide = {s.background.name for s, _ in training_scenes(concept, "unbiased") if s.background}
        assert element.category == "background" or len(wide) > len(places)


def test_scene_of_names_exactly_its_concepts() -> None:
    chosen = sets(5)[7]
    assert [e.concept for e in scene_of(chosen).elements()] == list(chosen)
