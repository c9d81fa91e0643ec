"""What only the embedded world can show; its weights are needed."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmlora.emoji import captions, clip, truth, weights
from cmlora.emoji.scenes import render, scene_of
from cmlora.emoji.world import BY_CONCEPT
from cmlora.eval.scorers.scorer import Item
from cmlora.eval.scoring import make_scorer
from cmlora.eval.statistics import wilcoxon
from cmlora.eval.testbeds import find_testbed

pytestmark = pytest.mark.slow


def rendered(folder: Path, count: int) -> list[Item]:
    """Pictures that are exactly what they should be, of sets of 2 to 5."""
    bed = find_testbed("emoji")
    found = []
    for index in range(count):
        sets = bed.combinations(2 + index % 4)
        ids = sets[(7 * index) % len(sets)]
        path = folder / f"{index}.png"
        Image.fromarray(render(scene_of(ids), np.random.default_rng((3, index)))).save(path)
        found.append(Item(path, ids, bed))
    return found


def test_matching_words_beat_shuffled_ones(tmp_path: Path) -> None:
    """CLIPScore of the small CLIP on 120 renders, p < 1e-6; and it is a plain loop's."""
    items = rendered(tmp_path, 120)
    judge = make_scorer("clip_score", items[0].manifest)
    right = [m.values["clip_score"] for m in judge(items)]
    texts = [captions.prompt(tuple(BY_CONCEPT[i] for i in item.ids)) for item in items]
    alone = [clip.score([i.image()], [t])[0] for i, t in zip(items[:20], texts, strict=False)]
    assert right[:20] == pytest.approx(alone, abs=1e-4)
    order = np.random.default_rng(0).permutation(len(items))
    wrong = clip.score([item.image() for item in items], [texts[i] for i in order])
    difference = np.array(right) - np.array(wrong)
    assert difference.mean() > 0
    assert wilcoxon(difference) < 1e-6


def test_probe_and_fidelity_know_renders(tmp_path: Path) -> None:
    items = rendered(tmp_path, 24)
    marks = make_scorer("probe", items[0].manifest)(items)
    assert np.mean([m.values["instances"] for m in marks]) > 0.8
    assert all(set(m.concepts) == set(i.ids) for m, i in zip(marks, items, strict=True))
    near = [m.values["fidelity"] for m in make_scorer("fidelity", items[0].manifest)(items)]
    others = [items[(place + 1) % len(items)].ids for place in range(len(items))]
    far = [truth.fidelity([i.image()], ids) for i, ids in zip(items, others, strict=True)]
    assert np.mean(near) < np.mean(far)


def test_likeness_is_highest_for_the_own_concept(tmp_path: Path) -> None:
    bed = find_testbed("emoji")
    judge = make_scorer("clip_image", bed)
    right = []
    for place, id_ in enumerate(weights.LORAS):
        path = tmp_path / f"{id_}.png"
        Image.fromarray(render(scene_of((id_,)), np.random.default_rng(place))).save(path)
        marks = judge([Item(path, weights.LORAS, bed)])[0].concepts
        right.append(max(marks, key=lambda i: marks[i]["clip_image"]) == id_)
    assert np.mean(right) > 0.7
