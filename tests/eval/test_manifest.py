"""Testbeds as data: what is accepted, which sets come out, where weights are found."""

import json
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cmlora.emoji import weights, world
from cmlora.errors import CmloraError
from cmlora.eval.manifest import Manifest, set_id
from cmlora.eval.testbeds import (
    SHIPPED,
    OtherName,
    check_weights,
    find_testbed,
    init,
    weights_of,
)
from cmlora.files import write
from cmlora.lora import LoRA
from tests import disk
from tests.eval import beds


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_testbeds_have_the_sets_of_the_field(name: str) -> None:
    bed = find_testbed(name)
    assert [len(bed.combinations(n)) for n in (1, 2, 3, 4, 5, 6)] == [3, 24, 72, 96, 48, 0]
    for size in range(2, 6):
        for ids in bed.combinations(size):
            found = [bed.by_id[id_].category for id_ in ids]
            assert len(set(found)) == size
            assert "character" in found
    assert Manifest.from_dict(bed.to_dict()) == bed


def test_the_emoji_testbed_is_the_world_it_was_made_of() -> None:
    bed = find_testbed("emoji")
    assert tuple(lora.id for lora in bed.loras) == weights.LORAS
    assert bed.guidance_scale == weights.GUIDANCE
    assert bed.steps == weights.STEPS
    for lora in bed.loras:
        element = world.BY_CONCEPT[lora.id]
        assert (lora.trigger, lora.category) == (element.trigger, element.category)
        assert lora.name == element.name
    for size in range(2, 6):
        assert bed.combinations(size) == world.sets(size)


def test_the_unbiased_testbed_differs_in_its_files_only() -> None:
    bed, other = find_testbed("emoji"), find_testbed("emoji-unbiased")
    places = [weights_of(lora, other, None) for lora in other.loras]
    assert places == [weights.lora_path(name, "unbiased") for name in weights.LORAS]
    assert [replace(lora, file="") for lora in other.loras] == list(bed.loras)
    assert replace(other, name=bed.name, note=bed.note, loras=bed.loras) == bed


def test_settings_of_the_field() -> None:
    anime, reality = find_testbed("composlora-anime"), find_testbed("composlora-reality")
    assert (anime.steps, anime.guidance_scale, anime.width, anime.height) == (200, 10, 512, 512)
    assert (reality.steps, reality.guidance_scale) == (100, 7)
    assert (reality.width, reality.height) == (768, 1024)
    assert anime.prompt_of(["character_1", "object_2"]) == (
        "masterpiece, best quality, kamado nezuko, black hair, pink eyes, forehead, "
        "toast, toast in mouth"
    )


@given(st.integers(1, 4), st.integers(1, 60), st.integers(1, 60))
def test_smaller_samples_are_parts_of_larger_ones(size: int, few: int, many: int) -> None:
    bed = find_testbed("emoji")
    few, many = sorted((few, many))
    less, more = bed.sample(size, few), bed.sample(size, many)
    assert len(less) == min(few, len(bed.combinations(size)))
    assert set(less) <= set(more)
    assert [ids for ids in bed.combinations(size) if ids in set(less)] == less


def test_rules() -> None:
    every = beds.manifest(rule="all", required=[])
    assert len(every.combinations(2)) == 6
    assert every.combinations(2)[0] == ("ann", "cat")
    listed = beds.manifest(rule="listed", required=[], sets=[["ink", "cat"], ["ann"]])
    assert listed.combinations(2) == [("cat", "ink")]
    free = beds.manifest(required=[])
    expected = {("ann",), ("cat",), ("hat",), ("ink",)}
    assert set(free.combinations(1)) == expected
    pairs = {
        (a, b)
        for a, b in product(beds.CATEGORIES, repeat=2)
        if beds.CATEGORIES[a] < beds.CATEGORIES[b]
    }
    assert {tuple(sorted(ids)) for ids in free.combinations(2)} == {
        tuple(sorted(ids)) for ids in pairs
    }
    assert set_id(("a", "b")) == "a+b"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps is 0, not between 1"),
    ({"step": 3}, "unknown key 'step'; did you mean steps?"),
    ({"prompt": "no slot"}, "without {triggers} exactly once"),
    ({"loras": []}, "there are no loras"),
    ({"loras": [{"id": "a"}]}, "category is missing"),
    ({"loras": [{"id": "a/b", "category": "x", "triggers": []}]}, "an id is up to"),
    ({"loras": "cat"}, "loras is not a list of tables"),
    ({"required": ["charakter"]}, "required category 'charakter' is none of character"),
    ({"sets": [["cat"]]}, "if, and only if, the rule is 'listed'"),
    ({"rule": "listed", "sets": [["kat"]]}, "did you mean hat?"),
    ({"rule": "listed", "sets": [["cat", "cat"]]}, "says something twice"),
    ({"rule": "some"}, "not one of one_per_category, all, listed"),
    ({"seeds": []}, "not a list of at least one"),
    ({"seeds": [-1]}, "a seed is -1"),
    ({"guidance_scale": "high"}, "guidance_scale is 'high', not a number"),
    ({"cmlora_testbed": 2}, "upgrade cmlora"),
    ({"scheduler_config": 3}, "not a table"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CmloraError) as caught:
        beds.manifest(**change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_and_yaml_are_the_same(tmp_path: Path) -> None:
    table = beds.manifest(required=[]).to_dict()
    (tmp_path / "a.json").write_text(json.dumps(table))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(table))
    assert find_testbed(tmp_path / "a.json") == find_testbed(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("a: [")
    with pytest.raises(CmloraError, match=r"b\.yaml is not YAML"):
        find_testbed(tmp_path / "b.yaml")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(CmloraError, match=r"c\.json is not JSON"):
        find_testbed(tmp_path / "c.json")
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(CmloraError, match="no key 'cmlora_testbed'"):
        find_testbed(tmp_path / "d.json")


def test_an_unknown_testbed_lists_the_known_ones() -> None:
    with pytest.raises(CmloraError, match="give emoji, emoji-unbiased, composlora-anime"):
        find_testbed("composlora")


def test_weights_are_found_by_id(tmp_path: Path) -> None:
    bed = beds.manifest()
    cat = bed.by_id["cat"]
    with pytest.raises(CmloraError, match=r"there is no cat\.safetensors"):
        weights_of(cat, bed, tmp_path)
    inner = tmp_path / "anime"
    inner.mkdir()
    disk.save_lora(inner, "cat_v2-final")
    assert weights_of(cat, bed, tmp_path) == inner / "cat_v2-final.safetensors"
    disk.save_lora(inner, "cat3")  # another id that begins the same
    assert weights_of(cat, bed, tmp_path) == inner / "cat_v2-final.safetensors"
    disk.save_lora(inner, "cat_b")
    with pytest.raises(CmloraError, match="name one as its file"):
        weights_of(cat, bed, tmp_path)
    disk.save_lora(tmp_path, "cat")
    assert weights_of(cat, bed, tmp_path) == tmp_path / "cat.safetensors"


def test_files_are_checked_by_hash_and_by_name(tmp_path: Path) -> None:
    path = tmp_path / "style_1.safetensors"
    updates = {}
    source = disk.save_lora(tmp_path, "source")
    from cmlora.files import read

    updates = dict(read(source).updates)
    write(LoRA("Watercolour Dreams", updates, triggers=("wtrclr",)), path)
    table = beds.manifest().to_dict()
    table["loras"][0] |= {"name": "Ink Wash", "triggers": ["shuimo"]}
    with pytest.warns(OtherName, match="mentions nothing of 'Ink Wash'"):
        check_weights(Manifest.from_dict(table).loras[0], path)
    table["loras"][0] |= {"name": "Watercolour", "sha256": "0" * 64}
    with pytest.raises(CmloraError, match="it is another file"):
        check_weights(Manifest.from_dict(table).loras[0], path)
    table["loras"][0] |= {"sha256": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_weights(Manifest.from_dict(table).loras[0], path)


def test_a_folder_becomes_a_testbed(tmp_path: Path) -> None:
    for name in ("cat", "hat", "ink"):
        disk.save_lora(tmp_path, name)
    path = init(tmp_path, "owner/model")
    bed = find_testbed(tmp_path)
    assert path == tmp_path / "testbed.json"
    assert bed.model == "owner/model"
    assert bed.rule == "all"
    assert len(bed.combinations(2)) == 3
    assert bed.prompt_of(("cat", "ink")) == "the cat, the ink"
    for concept in bed.loras:
        check_weights(concept, weights_of(concept, bed, tmp_path))
    with pytest.raises(CmloraError, match="exists already"):
        init(tmp_path, "owner/model")


def test_categories_of_the_files_make_the_rule(tmp_path: Path) -> None:
    for name, category in (("cat", "character"), ("dog", "character"), ("ink", "style")):
        path = disk.save_lora(tmp_path, name)
        from cmlora.files import read

        lora = read(path)
        metadata = {**lora.metadata, "cmlora.category": category}
        write(LoRA(name, lora.updates, metadata, lora.triggers), path)
    init(tmp_path, "owner/model")
    bed = find_testbed(tmp_path)
    assert bed.combinations(2) == [("cat", "ink"), ("dog", "ink")]
    assert bed.required == ("character",)
