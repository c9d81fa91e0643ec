"""The published tables beside a run's own numbers."""

from pathlib import Path

import numpy as np
import pytest

from cmlora.errors import CmloraError
from cmlora.eval.paper import beside, published
from cmlora.eval.report.summary import summarise
from cmlora.eval.report.tables import interval_text
from cmlora.strategies import METHODS
from tests.eval.made import WORDS, make_study


def test_published_tables_beside_a_run(tmp_path: Path) -> None:
    alone = beside()
    assert len(alone) == len(published()) == 8
    cmlora = next(row for row in alone[0].rows if row[0] == "CMLoRA")
    assert list(cmlora[1:]) == ["published", "35.42", "35.22", "35.21", "34.34", "35.05"]
    run = make_study(tmp_path / "anime", testbed="composlora-anime", sets=4)
    shown = beside(run, only=["clip_score"])[0]
    rows = [row for row in shown.rows if row[1] != "published"]
    assert {row[0] for row in rows} == {f"`{word}`" for word in WORDS}
    cell = summarise(run).cell("clip_score", "merge", 2)
    merge = next(row for row in rows if row[0] == "`merge`")
    assert merge[1] == "measured, composlora-anime"
    assert merge[2] == interval_text(cell, 2)
    assert "published are means with composlora-reality" in shown.note
    other = make_study(tmp_path / "emoji", sets=2, sizes=(2, 3))
    shown = beside(other, only=["clip_score"])[0]
    assert "cannot be compared with them" in shown.note
    merge = next(row for row in shown.rows if row[0] == "`merge`")
    assert merge[4:] == ["-", "-", "-"]  # N = 4, N = 5 and the mean were not measured
    assert "measured none of these cells" in beside(other, only=["zhong_wins"])[0].note
    with pytest.raises(CmloraError, match="no published table 'table1'"):
        beside(only=["table1"])


def test_later_methods_and_variants_have_their_rows(tmp_path: Path) -> None:
    words = ("merge", "switch[tau=2]", "w_switch", "w_composite", "loratorio", "multlfg")
    run = make_study(
        tmp_path / "anime",
        testbed="composlora-anime",
        sets=2,
        words=words,
        metrics=("clip_score", "clip_image"),
        quality=lambda method, n, rng: float(rng.random()),
    )
    scores, likeness = beside(run, only=["clip_score", "prompt_aware"])
    measured = [row[0] for row in scores.rows if row[1] != "published"]
    assert measured == ["`merge`", "`switch[tau=2]`", "`multlfg`", "`loratorio`"]
    assert {"`w_switch`", "`w_composite`"} <= {row[0] for row in likeness.rows}
    assert all(row["method"] in METHODS for table in published() for row in table["rows"])


def test_published_means_are_those_of_their_rows() -> None:
    """Except where the source itself has another value; then the cells tell."""
    table = published()[0]
    for row in table["rows"]:
        assert row["values"][-1] == pytest.approx(np.mean(row["values"][:4]), abs=0.011), row
