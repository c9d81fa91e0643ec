"""Metrics against people."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from cmlora.errors import CmloraError
from cmlora.eval.correlate import correlate, rater_agreement, read_scores, tables, to_dict


def written(path: Path, items: list[dict[str, Any]], **changes: Any) -> Path:
    path.write_text(json.dumps({"cmlora_scores": 1, "items": items} | changes))
    return path


def study(count: int = 60) -> list[dict[str, Any]]:
    """Pictures with a true quality, two raters who see it dimly, a good metric and a bad one."""
    rng = np.random.default_rng(5)
    found = []
    for place in range(count):
        method = ("merge", "switch", "composite")[place % 3]
        true = rng.normal() + place % 3
        found.append(
            {
                "id": f"p{place}",
                "method": method,
                "set": f"s{place // 3}",
                "human": {
                    "composition": {
                        "anna": true + 0.5 * rng.normal(),
                        "ben": true + 0.5 * rng.normal(),
                    }
                },
                "metrics": {
                    "good": 2 * true + 0.2 * rng.normal(),
                    "useless": float(rng.normal()),
                },
            }
        )
    return found


def test_correlations_are_scipys_and_tell_good_from_useless(tmp_path: Path) -> None:
    items = read_scores(written(tmp_path / "a.json", study()))
    found = {one.metric: one for one in correlate(items)}
    people = [item.mean("composition") for item in items]
    for metric, one in found.items():
        values = [item.metrics[metric] for item in items]
        expected = {
            "pearson": stats.pearsonr(people, values).statistic,
            "spearman": stats.spearmanr(people, values).statistic,
            "kendall": stats.kendalltau(people, values).statistic,
        }
        for kind, cell in one.coefficients.items():
            assert cell.value == pytest.approx(expected[kind])
            assert cell.low < cell.value < cell.high
            assert cell.count == 20
    assert found["good"].coefficients["pearson"].low > 0.7
    useless = found["useless"].coefficients["pearson"]
    assert useless.low < 0 < useless.high
    assert found["good"].between["pearson"] > 0.9
    assert found["good"].methods == 3


def test_raters_and_tables(tmp_path: Path) -> None:
    items = read_scores(written(tmp_path / "a.json", study()))
    alpha, raters = rater_agreement(items, "composition")
    assert raters == 2
    assert 0.6 < alpha < 1
    shown = "\n".join(table.markdown() for table in tables(items))
    assert "Krippendorff" in shown
    assert "| composition | good | 60 |" in shown
    assert "`switch`" in shown
    table = to_dict(items)
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_gaps_are_left_out(tmp_path: Path) -> None:
    rows = study(12)
    del rows[0]["metrics"]["good"]
    rows[1]["human"] = {}
    del rows[2]["set"]
    rows[3]["human"]["composition"].pop("ben")
    items = read_scores(written(tmp_path / "a.json", rows))
    found = {one.metric: one for one in correlate(items)}
    assert found["good"].items == 10
    assert found["useless"].items == 11
    assert items[2].unit == "p2"
    one_rater = [{**row, "human": {"q": {"anna": 1}}} for row in rows]
    assert math.isnan(rater_agreement(read_scores(written(tmp_path / "b.json", one_rater)), "q")[0])


WRONG: list[tuple[Any, str]] = [
    ([], "items is not a list with something in it"),
    ([3], "item 0 is not a table"),
    ([{"id": "a"}], "item 0: method is None"),
    ([{"id": "a", "method": "m", "human": 3, "metrics": {}}], "human is 3, not a table"),
    (
        [{"id": "a", "method": "m", "human": {"q": {"anna": "good"}}, "metrics": {}}],
        "item 0, human.q: anna is 'good', not a number",
    ),
    ([{"id": "a", "method": "m", "human": {}, "metrics": {}, "rater": 1}], "unknown key 'rater'"),
    ([{"id": "a", "method": "m", "human": {}, "metrics": {}}] * 2, "two items have the same id"),
]


@pytest.mark.parametrize(("items", "message"), WRONG)
def test_what_is_wrong_is_named(items: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CmloraError) as caught:
        read_scores(written(tmp_path / "a.json", items))
    assert message in str(caught.value)
    with pytest.raises(CmloraError, match="there is no cmlora_scores: 1"):
        read_scores(written(tmp_path / "a.json", [], cmlora_scores=2))
