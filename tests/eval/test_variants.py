"""Methods with options and caches as words: read, written back, told apart."""

from pathlib import Path
from typing import Any

import pytest

from cmlora.cli import arguments
from cmlora.cost import PassCost
from cmlora.errors import CmloraError
from cmlora.eval.jobs import jobs_of, planned_cost
from cmlora.eval.runner import run
from cmlora.eval.study import Record, Study
from cmlora.eval.variants import Variant, canonical, read
from cmlora.recipe import from_png
from tests.eval import beds

WORDS = (
    "cmlora",
    "cmlora@nonuniform:2,4,0.25,0.875",
    "cmlora[order=high_first]@uniform:2",
    "cmlora[order=low_first,decay=0.8]@uniform:2",
    "cmlora[decay=false,dominant_full=always]@uniform:3+turns",
    "cmlora[partition=async,switch=0.05,max_age=none]",
    "select[strength=2,bands=low_first]",
    "lorahub[coefficients=0.5,-1,0.25]",
)


@pytest.mark.parametrize("word", WORDS)
def test_a_label_is_read_back(word: str) -> None:
    (variant,) = read([word])
    assert variant.label == word
    assert read([variant.label]) == (variant,)
    assert hash(variant) == hash(read([word])[0])


def test_a_list_is_cut_between_variants_only() -> None:
    assert arguments.variants(",".join(WORDS)) == WORDS
    spaced = arguments.variants(" merge , switch[ tau = 2 ] ,select[strength=1, patch=2]@ none")
    assert [canonical(word) for word in spaced] == [
        "merge",
        "switch[tau=2]",
        "select[strength=1,patch=2]",
    ]


def test_values_are_of_the_options_kind_and_in_the_methods_order() -> None:
    (variant,) = read(["cmlora[decay=1e-1, late=.50,probes=2,order=low_first,max_age=None]"])
    assert variant.options == {
        "order": "low_first",
        "late": 0.5,
        "decay": 0.1,
        "max_age": None,
        "probes": 2,
    }
    assert list(variant.options) == ["order", "late", "decay", "max_age", "probes"]
    assert variant.label == "cmlora[order=low_first,late=0.5,decay=0.1,max_age=none,probes=2]"
    assert variant.slug.isascii()
    assert "/" not in variant.slug


def test_long_labels_have_short_names_of_their_own() -> None:
    long = [f"lorahub[coefficients={','.join(['0.123'] * 30)},{end}]" for end in ("1", "2")]
    one, other = (variant.slug for variant in read(long))
    assert len(one) == len(other) == 80
    assert one != other


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cmlora[ordr=high_first]"], "cmlora has no option 'ordr'; did you mean order?"),
        (["cmlora[order=first]"], "order is 'first', expected 'measured' or "),
        (["cmlora[late=2]"], "late is '2', expected a number, 0 to 1"),
        (["cmlora[decay=0.8"], "the bracket is not closed; write METHOD[KEY=VALUE"),
        (["cmlora decay=0.8]"], "']' closes no bracket"),
        (["cmlora[decay]"], "'decay' is not KEY=VALUE"),
        (["cmlora[]"], "'' is not KEY=VALUE"),
        (["cmlora[decay=]"], "'decay=' is not KEY=VALUE"),
        (["cmlora[decay=1,decay=0]"], "decay is given twice"),
        (["cmlora[decay=0.8]uniform:2"], "'uniform:2' follows the bracket"),
        (["cmlora@uniform:2[decay=0.8]"], "options go before the cache policy"),
        (["merge[tau=2]"], "merge has no option 'tau'; it has no options"),
        (["swich[tau=2]"], "unknown composition method 'swich'; did you mean switch"),
        (["cmlora[decay=0.8]@unifrm:2"], "did you mean uniform"),
        (["switch[tau=2]", "switch[tau=2]"], "'switch[tau=2]' is listed twice"),
        (["switch", "switch[tau=5]"], "'switch' and 'switch[tau=5]' are the same"),
    ],
)
def test_mistakes_are_pointed_at(words: list[str], message: str) -> None:
    with pytest.raises(CmloraError) as failure:
        read(words)
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_variants_own_options_win(bed: Path) -> None:
    studio = beds.open_studio(bed)
    sets = studio.manifest.sample(2, 1)
    variants = read(["switch", "switch[tau=1]", "switch_a", "merge"])
    jobs = jobs_of(studio, sets, variants, (0,), {"tau": "2"})
    assert [job.recipe.options for job in jobs] == [{"tau": 2}, {"tau": 1}, {"tau": 2}, {}]
    with pytest.raises(CmloraError, match=r"'switch' and 'switch\[tau=2\]' are the same with"):
        jobs_of(studio, sets, read(["switch", "switch[tau=2]"]), (0,), {"tau": "2"})


def test_keys_are_of_what_is_done_and_not_of_how_it_was_written(bed: Path) -> None:
    """Options in brackets and common ones come to the same picture, so to the same key."""
    studio = beds.open_studio(bed)
    sets = studio.manifest.sample(2, 1)

    def keys(words: list[str], options: dict[str, Any] | None = None) -> list[str]:
        return [job.key for job in jobs_of(studio, sets, read(words), (0,), options)]

    one, other = keys(["cmlora[late=0.5,decay=0.8]@uniform:2", "cmlora@uniform:2"])
    assert one != other
    assert keys(["cmlora[decay=.80,late=.5]@uniform:2"]) == [one]
    assert keys(["cmlora@uniform:2"], {"decay": "0.8", "late": 0.5}) == [one]


def test_variants_of_one_method_are_made_side_by_side(bed: Path, tmp_path: Path) -> None:
    words = ["switch[tau=1]", "switch[tau=3]", "cmlora[dominant_full=always]@uniform:2"]
    studio, study, one = beds.open_studio(bed), Study(tmp_path), PassCost(full=100, light=1)
    jobs = jobs_of(studio, studio.manifest.sample(2, 1), read(words), (5,))
    study.begin(studio, {}, one)
    assert run(study, studio, jobs, cost=one).made == 3
    assert run(study, studio, jobs, cost=one).kept == 3
    records = study.records()
    for job in jobs:
        record, own = records[job.key], dict(job.variant.options)
        assert record.label == job.variant.label
        assert record.options == from_png(tmp_path / record.image).options == own
        assert record.macs == planned_cost(studio, job, one).macs
    assert {record.label for record in records.values()} == set(words)
    assert len({record.sha256 for record in records.values()}) == 3


def test_records_without_a_variant_are_of_the_plain_one() -> None:
    facts: dict[str, Any] = {"key": "0", "ids": ("a",), "seed": 0, "image": "a", "sha256": ""}
    record = Record(**facts, method="cmlora", cache="uniform:2", seconds=1, full=1, light=1, macs=1)
    assert record.label == "cmlora@uniform:2" == Variant("cmlora", "uniform:2").label
