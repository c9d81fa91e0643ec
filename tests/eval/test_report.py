"""Reports: the numbers in them are those of the run, and the files stand alone."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from cmlora.errors import CmloraError
from cmlora.eval.metrics import metric_of
from cmlora.eval.report.charts import Point, Series, forest, scatter
from cmlora.eval.report.gallery import contact_sheet, shelves
from cmlora.eval.report.plots import front
from cmlora.eval.report.selection import Selection
from cmlora.eval.report.summary import findings, focus_of, summarise
from cmlora.eval.report.tables import (
    Table,
    difference_table,
    interval_text,
    metric_table,
    overview_table,
    survival_table,
    wins_table,
)
from cmlora.eval.report.write import write_report
from cmlora.eval.statistics import sign_flip
from cmlora.eval.study import Study
from tests.eval.made import WORDS, make_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("made") / "run")


def values(study: Study, label: str, n: int) -> dict[str, list[float]]:
    """Concepts found per set, read from the files."""
    lines = (study.folder / "scores" / "probe-00000.jsonl").read_text().splitlines()
    scores = {row["key"]: row["values"]["instances"] for row in map(json.loads, lines)}
    found: dict[str, list[float]] = {}
    for record in study.records().values():
        if record.label == label and record.n == n:
            found.setdefault("+".join(record.ids), []).append(scores[record.key])
    return found


def test_cells_are_means_over_sets(study: Study) -> None:
    summary = summarise(study)
    assert summary.labels == WORDS
    assert summary.sizes == (2, 3, 4, 5)
    means = []
    for n in summary.sizes:
        sets = [float(np.mean(v)) for v in values(study, "merge", n).values()]
        cell = summary.cell("instances", "merge", n)
        assert cell.value == pytest.approx(np.mean(sets))
        assert cell.count == 20
        means.append(np.mean(sets))
        spread = float(np.std(sets, ddof=1)) / 20**0.5
        assert cell.high - cell.low == pytest.approx(2 * 1.96 * spread, rel=0.25)
    overall = summary.cell("instances", "merge", None)
    assert overall.value == pytest.approx(np.mean(means))
    two = summary.cell("instances", "merge", 2)
    assert overall.high - overall.low < two.high - two.low


def test_differences_are_paired_and_tested(study: Study) -> None:
    summary = summarise(study)
    found = summary.differences("instances", "merge", 3)
    for label in ("naive", "switch", "composite"):
        ours, theirs = values(study, label, 3), values(study, "merge", 3)
        d = [np.mean(ours[s]) - np.mean(theirs[s]) for s in sorted(ours)]
        assert found[label].value == pytest.approx(np.mean(d))
        alone = stats.ttest_1samp(d, 0).pvalue
        assert found[label].p >= min(1.0, alone) - 0.02  # corrected, so never far below
    assert found["naive"].better is False
    assert found["composite"].better is True
    assert summary.differences("instances", "merge", None)["switch"].better is None
    assert summary.differences("seconds", "merge", None)["composite"].better is False
    assert "merge" not in found


def test_findings_also_say_where_the_method_loses(study: Study) -> None:
    summary = summarise(study)
    said = findings(summary, focus_of(summary))
    assert said[0].startswith("By concepts found, `cmlora@nonuniform` (0.")
    assert "better than `naive`, `merge`, `switch`" in said[0]
    assert "worse than `composite`" in said[0]
    assert any("no difference is shown to" in line for line in findings(summary, "switch"))
    with pytest.raises(CmloraError, match="no pictures of 'select'"):
        focus_of(summary, "select")


def test_wins_are_counted_place_by_place(study: Study) -> None:
    summary = summarise(study)
    wins = summary.wins("instances")
    won, tied, lost = wins["composite", "naive"]
    assert won + tied + lost == 160
    assert wins["naive", "composite"] == (lost, tied, won)
    a, b = values(study, "composite", 2), values(study, "naive", 2)
    small = sum(x > y for s in a for x, y in zip(a[s], b[s], strict=True))
    assert small <= won
    cheaper = summary.wins("seconds")["naive", "composite"]
    assert cheaper == (160, 0, 0)


def test_tables_mark_the_best_and_the_significant(study: Study) -> None:
    summary = summarise(study)
    table = metric_table(summary, metric_of("instances"), "merge")
    rows = {row[0]: row[1:] for row in table.rows}
    assert table.head == ["method", "N = 2", "N = 3", "N = 4", "N = 5", "mean"]
    assert all(cell.startswith("**0.9") for cell in rows["`composite`"])
    assert all("▼" in cell for cell in rows["`naive`"])
    assert not any("▲" in cell or "▼" in cell for cell in rows["`merge`"])
    shown = re.fullmatch(r"([\d.]+) \[([\d.]+), ([\d.]+)\] ▼", rows["`naive`"][0])
    assert shown is not None
    assert float(shown[2]) <= float(shown[1]) <= float(shown[3])
    survived = survival_table(summary, "instance")
    assert survived is not None
    assert survived.head[1:] == ["character", "clothing", "style", "background", "object"]
    matrix = wins_table("x", summary.labels, summary.wins("instances"))
    assert matrix is not None
    for cell in (c for row in matrix.rows for c in row[1:] if c != "-"):
        assert sum(map(int, cell.split("-"))) == 100


def test_the_overview_has_quality_and_price(study: Study) -> None:
    summary = summarise(study)
    table = overview_table(summary, [metric_of("instances"), metric_of("clip_score")], "merge")
    head = ["method", "concepts found", "CLIPScore", "GMACs", "of `merge`", "seconds"]
    assert table.head == head
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["`merge`"][2:4] == ["30.0", "1.00"]
    # 30 N passes for N = 2 to 5 against 30
    assert rows["`composite`"][2:4] == ["105.0", "3.50"]
    assert rows["`composite`"][0].startswith("**0.9")
    assert rows["`composite`"][0].endswith(" ▲")
    cell = summary.cell("instances", "switch", None)
    assert rows["`switch`"][0] == interval_text(cell, 3)


def test_differences_have_intervals_of_their_own(study: Study) -> None:
    """scipy's bootstrap of the paired differences; narrower than the two means' intervals."""
    summary = summarise(study)
    ours, theirs = values(study, "composite", 4), values(study, "merge", 4)
    d = np.array([np.mean(ours[s]) - np.mean(theirs[s]) for s in sorted(ours)])
    found = summary.differences("instances", "merge", 4)["composite"]
    known = stats.bootstrap((d,), np.mean, method="BCa", n_resamples=9999, rng=1)
    width = found.interval.high - found.interval.low
    assert abs(found.interval.low - known.confidence_interval.low) < 0.06 * width
    assert abs(found.interval.high - known.confidence_interval.high) < 0.06 * width
    table = difference_table(summary, metric_of("instances"), "merge")
    assert table is not None
    rows = {row[0]: row[1:] for row in table.rows}
    assert "`merge`" not in rows
    text = rows["`composite`"][2]
    low, high = found.interval.low, found.interval.high
    assert text == f"{d.mean():+.3f} [{low:+.3f}, {high:+.3f}], p < 0.001"
    mean = summary.differences("instances", "merge", None)["composite"]
    assert mean.value == pytest.approx(
        np.mean(
            [summary.differences("instances", "merge", n)["composite"].value for n in (2, 3, 4, 5)]
        )
    )
    assert mean.interval.low < mean.value < mean.interval.high


def test_too_few_sets_are_said(tmp_path: Path) -> None:
    few = summarise(make_study(tmp_path / "few", sets=8, sizes=(2, 3), seeds=(0,)))
    assert few.missing() == []
    fewer = summarise(make_study(tmp_path / "fewer", sets=7, sizes=(2, 3), seeds=(0,)))
    assert 4 * sign_flip([1.0] * 8) < 0.05 < 4 * sign_flip([1.0] * 7)
    assert fewer.missing() == [
        "for N = 2, 3 there are too few sets to show any difference between 5 methods"
    ]


def test_variants_keep_their_names_and_matrices_their_width(tmp_path: Path) -> None:
    """Options of a variant stay legible: whole in tables and legends, a number over columns."""
    words = ("merge", "cmlora[order=low_first,decay=0.8]@uniform:2", "cmlora[late=0.5]@uniform:2")
    run = make_study(tmp_path / "run", words=words, sizes=(2, 3), sets=8)
    files = write_report(run, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert all(f"`{word}`" in text for word in words)
    assert "|  | 1 | 2 | 3 |" in text
    assert f"| 2 `{words[2]}` |" in text or f"| 2 `{words[1]}` |" in text
    for path in files:
        if path.suffix == ".svg":
            svg = ElementTree.fromstring(path.read_text())
            for label in (e for e in svg.iter() if e.tag.endswith("text") and e.text in words):
                assert float(label.get("x", "")) + 6 * len(label.text or "") < float(
                    svg.get("width", "")
                )
    found = (tmp_path / "report" / "report.tex").read_text()
    assert r"\texttt{cmlora[order=low\_first,decay=0.8]@uniform:2}" in found
    assert summarise(run).cell("instances", words[1], 2).count == 8


def test_some_methods_alone_are_corrected_for_themselves(study: Study, tmp_path: Path) -> None:
    whole, some = summarise(study), summarise(study, Selection(["merge", "switch", "naive"]))
    assert some.labels == ("naive", "merge", "switch")
    for metric in ("instances", "seconds"):
        for label in ("naive", "switch"):
            assert some.cell(metric, label, 3) == whole.cell(metric, label, 3)
    alone = [summary.differences("instances", "merge", 2)["switch"].p for summary in (some, whole)]
    assert alone[0] <= alone[1]
    write_report(study, tmp_path, selection=Selection(["merge", "switch"]), per_size=1)
    text = (tmp_path / "report.md").read_text()
    assert "`composite`" not in text
    assert "2 methods, 320 pictures" in text
    with pytest.raises(CmloraError, match="no pictures of 'select'; there are cmlora@nonuniform"):
        summarise(study, Selection(["merge", "select"]))


def test_latex_has_no_bare_marks() -> None:
    rows = [["`a_b`", "**0.5 [0.4, 0.6]** ▲", "-0.1 & 5 %"]]
    text = Table("x_1", ["method", "N = 2", "c"], rows, "p < 0.05").latex()
    cells = (r"\texttt{a\_b}", r"\textbf{0.5 {\scriptsize [0.4, 0.6]}} $\blacktriangle$")
    row = " & ".join((*cells, r"$-$0.1 \& 5 \%")) + r" \\"
    assert row in text
    assert r"\caption{X\_1. p $<$ 0.05}" in text
    assert r"\begin{tabular}{lrr}" in text


class Page(HTMLParser):
    """What a page refers to, and whether its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.targets: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.images += tag == "img"
        self.targets += [v for k, v in attributes if k in ("src", "href")]

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        """`<rect ... />` opens nothing."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_files_stand_alone(study: Study, tmp_path: Path) -> None:
    files = write_report(study, tmp_path / "report", per_size=2)
    names = {path.name for path in files}
    assert {"report.md", "report.csv", "report.html", "instances_by_gmacs.svg"} <= names
    html = (tmp_path / "report" / "report.html").read_text()
    page = Page()
    page.feed(html)
    assert page.open == []
    assert page.images == 4 * 2 * (len(WORDS) + 1)  # and a drawing of what was asked for
    assert all(target.startswith("data:image/") for target in page.targets)
    assert "<script" not in html
    assert html.count("<details>") == 4 * 2 * len(WORDS)
    assert html.count("found<br>") == 4 * 2 * len(WORDS)
    assert study.manifest.prompt_of(study.manifest.sample(2, 20)[0]) in html
    for path in files:
        if path.suffix == ".svg":
            ElementTree.fromstring(path.read_text())
    text = (tmp_path / "report" / "report.md").read_text()
    for name in re.findall(r"\]\((\S+)\)", text):
        assert (tmp_path / "report" / name).is_file()
    tex = (tmp_path / "report" / "report.tex").read_text()
    assert tex.count(r"\begin{tabular}") == text.count("|---|")
    for heading in ("What was compared", "What it shows", "Quality", "Cost and sanity", "Plots"):
        assert f"## {heading}" in text
        assert heading in html
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report" / "report.csv").read_text())))
    cell = summarise(study).cell("instances", "merge", 3)
    row = next(r for r in rows if (r["metric"], r["method"], r["n"]) == ("instances", "merge", "3"))
    assert float(row["value"]) == pytest.approx(cell.value)
    assert float(row["low"]) == pytest.approx(cell.low)
    row = next(
        r for r in rows if (r["metric"], r["method"], r["n"]) == ("instances", "composite", "3")
    )
    ours, theirs = values(study, "composite", 3), values(study, "merge", 3)
    d = [np.mean(ours[s]) - np.mean(theirs[s]) for s in sorted(ours)]
    ranks = stats.wilcoxon(
        np.round(d, 9), zero_method="wilcox", correction=False, method="asymptotic"
    )
    assert float(row["p_wilcoxon"]) == pytest.approx(ranks.pvalue, rel=1e-6)
    assert float(row["difference"]) == pytest.approx(np.mean(d), abs=1e-8)


def test_reports_of_a_real_run(whole: Path, tmp_path: Path) -> None:
    """Nothing was scored: costs are there all the same, and recipes of the real pictures."""
    files = write_report(Study(whole), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "GMACs per picture" in text
    assert "no frequency profiles" in text
    assert "16 pictures" in text
    assert '"method": "cmlora"' in (tmp_path / "report.html").read_text().replace("&quot;", '"')
    assert not [path for path in files if path.suffix == ".svg"]


def test_incomplete_runs_say_so(study: Study, tmp_path: Path) -> None:
    import shutil

    other = Study(shutil.copytree(study.folder, tmp_path / "run"))
    part = other.folder / "records" / "part-00000.jsonl"
    lines = part.read_text().splitlines()
    part.write_text("\n".join([*lines[3:], '{"key":"ff","error":"RuntimeError: x"}']) + "\n")
    write_report(other, tmp_path / "report", per_size=0)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "do not have equally many pictures for N = 2" in text
    assert "**1 jobs failed**" in text
    with pytest.raises(CmloraError, match="the run has no metric 'hps'"):
        write_report(other, tmp_path / "report", metrics=["hps"])
    with pytest.raises(CmloraError, match="holds no run"):
        write_report(Study(tmp_path / "nothing"))


def test_a_gallery_shows_every_method_of_a_set(study: Study) -> None:
    summary = summarise(study)
    shown = shelves(summary, 3)
    assert len(shown) == 12
    for shelf in shown:
        assert [r.label for r in shelf.records] == list(summary.labels)
        assert {(r.ids, r.seed) for r in shelf.records} == {(shelf.ids, shelf.seed)}
    sheet = contact_sheet(study.folder, shown, tile=32)
    assert sheet is not None
    assert sheet.width > 5 * 32


def test_charts_put_points_where_they_belong() -> None:
    points = [Point(1, 10, 9, 11), Point(10, 20, 18, 22), Point(100, 30, 29, 33)]
    for log in (False, True):
        svg = ElementTree.fromstring(scatter("t & <t>", [Series("a", points)], "x", "y", log_x=log))
        marks = [e for e in svg.iter() if e.tag.endswith("circle")][:3]
        xs, ys = [float(m.get("cx", "")) for m in marks], [float(m.get("cy", "")) for m in marks]
        assert xs == sorted(xs)
        assert ys == sorted(ys, reverse=True)
        even = abs((xs[1] - xs[0]) - (xs[2] - xs[1])) < 0.2
        assert even == log
    assert scatter("t", [Series("a", [])], "x", "y") == ""
    behind = Series("a", [Point(1, 1)], behind=[Point(1, 1), Point(2, 9)])
    assert "stroke-dasharray" in scatter("t", [behind], "x", "y", front=[Point(1, 1), Point(2, 2)])
    one = scatter("t", [Series("a", [Point(3, 3)])], "x", "y", log_x=True)
    assert ElementTree.fromstring(one) is not None
    assert ElementTree.fromstring(forest("t", [("a", Point(1, 0, 0.5, 1.5))], "x")) is not None


def test_the_front_is_what_nothing_beats_at_its_price() -> None:
    rng = np.random.default_rng(2)
    points = [Point(float(x), float(y)) for x, y in rng.random((40, 2))]
    for name, sign in (("instances", 1), ("fidelity", -1)):
        found = front(points, metric_of(name))
        beaten = [
            any(q.x <= p.x and sign * q.y >= sign * p.y and q is not p for q in points)
            for p in points
        ]
        expected = [p for p, lost in zip(points, beaten, strict=True) if not lost]
        assert found == sorted(expected, key=lambda p: p.x)
    assert front(points, metric_of("sharpness")) == []
