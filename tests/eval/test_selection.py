"""Reports about a part of a run: methods, sizes, seeds, and what all methods have drawn."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmlora.errors import CmloraError
from cmlora.eval.report.selection import Selection
from cmlora.eval.report.summary import summarise
from cmlora.eval.study import Record, Study
from tests.calling import complaint, run
from tests.eval.made import make_study

SETS = [("a", "b"), ("a", "c"), ("a", "b", "c")]


def record(place: tuple[tuple[str, ...], str, int]) -> Record:
    ids, method, seed = place
    return Record(
        key=repr(place),
        ids=ids,
        method=method,
        cache="none",
        seed=seed,
        image="",
        sha256="",
        seconds=1.0,
        full=1.0,
        light=0.0,
        macs=None,
    )


places = st.sets(st.sampled_from(list(product(SETS, ("gate", "merge", "naive"), (0, 1, 2)))))


@given(places)
def test_common_places_have_every_method(found: set[Any]) -> None:
    records = [record(place) for place in sorted(found)]
    methods = {method for _, method, _ in found}
    shared = {
        (ids, seed)
        for ids, seed in product(SETS, (0, 1, 2))
        if methods and all((ids, method, seed) in found for method in methods)
    }
    selection = Selection(common=True)
    if not shared:
        with pytest.raises(CmloraError, match="no set and seed in common"):
            selection.of(records)
        return
    left = selection.of(records)
    assert {(r.ids, r.seed) for r in left} == shared
    assert len(left) == len(shared) * len(methods)
    assert selection.of(left) == left


@given(places.filter(bool), st.data())
def test_what_is_named_is_left(found: set[Any], data: Any) -> None:
    records = [record(place) for place in sorted(found)]
    sizes = data.draw(st.sets(st.sampled_from(sorted({len(ids) for ids, _, _ in found}))))
    seeds = data.draw(st.sets(st.sampled_from(sorted({seed for _, _, seed in found}))))
    expected = [
        r for r in records if (r.n in sizes or not sizes) and (r.seed in seeds or not seeds)
    ]
    selection = Selection(sizes=sorted(sizes), seeds=sorted(seeds))
    if expected:
        assert list(selection.of(records)) == expected
    else:
        with pytest.raises(CmloraError, match="no set and seed"):
            selection.of(records)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(["select"]), "no pictures of 'select'; there are gate, merge"),
        (Selection(sizes=[5]), "no sets of so many LoRAs: 5; there are 2, 3"),
        (Selection(seeds=[0, 7]), "no pictures with seed 7; there are 0, 1"),
    ],
)
def test_what_is_not_there_is_named(selection: Selection, message: str) -> None:
    records = [record(place) for place in product(SETS, ("gate", "merge"), (0, 1))]
    with pytest.raises(CmloraError, match=message):
        selection.of(records)


def test_a_summary_of_a_part(tmp_path: Path) -> None:
    study = make_study(tmp_path / "run", sets=8, sizes=(2, 3), seeds=(0, 1))
    path = study.folder / "records" / "part-00000.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    gone = next(row for row in rows if row["method"] == "switch" and len(row["ids"]) == 2)
    rows.remove(gone)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = Study(study.folder)
    whole = summarise(study)
    assert whole.missing()
    same = summarise(study, Selection(common=True))
    assert not [line for line in same.missing() if "equally many" in line]
    assert len(same.records) == len(rows) - 4  # the four other methods have that picture
    two = summarise(study, Selection(sizes=[2], seeds=[1]))
    assert two.sizes == (2,)
    assert {r.seed for r in two.records} == {1}
    cell, other = (s.cell("instances", "merge", 3) for s in (whole, same))
    assert cell == other


def test_from_the_command_line(tmp_path: Path) -> None:
    study = make_study(tmp_path / "run", sets=8, sizes=(2, 3))
    words = ("evaluate", "report", study.folder, "--gallery", "0", "--out", tmp_path / "part")
    run(*words, "--n", "3", "--seeds", "1", "--common")
    text = (tmp_path / "part" / "report.md").read_text()
    assert "seed 1; 8 sets of 3 LoRAs; 5 methods, 40 pictures" in text
    for wrong, message in (("7", "no sets of so many LoRAs: 7"), ("x", "expected numbers")):
        assert message in complaint((*words, "--n", wrong))
