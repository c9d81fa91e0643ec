"""Judges: what is asked, which answers count, what becomes of them."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cmlora.errors import CmloraError
from cmlora.eval.judge.backend import Answer, Turn
from cmlora.eval.judge.compare import Example, answers, judge, pairs, read_examples
from cmlora.eval.judge.http import HttpJudge, Limits
from cmlora.eval.judge.local import LocalJudge
from cmlora.eval.judge.protocol import Protocol, Unreadable, find_protocol
from cmlora.eval.judge.tally import OVERALL, judged
from cmlora.eval.study import Study
from tests.eval import models
from tests.eval.made import make_study
from tests.eval.server import Chat, brightness, fair, partial, served

FOUR = find_protocol("four")
QUICK = Limits(backoff=0.01, timeout=5, attempts=4)


@pytest.fixture
def study(whole: Path, tmp_path: Path) -> Study:
    """A copy, for verdicts of its own."""
    return Study(shutil.copytree(whole, tmp_path / "run"))


class Script:
    """A backend that says what it was told to."""

    name = "script"

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = list(texts), []  # type: ignore[var-annotated]

    def ask(self, turns: Any) -> Answer:
        self.asked.append(list(turns))
        return Answer(self.texts.pop(0) if len(self.texts) > 1 else self.texts[0])


def good(first: float = 5, second: float = 6, protocol: Protocol = FOUR) -> str:
    sides = {"first": first, "second": second}
    return json.dumps({s: dict.fromkeys(protocol.dimensions, m) for s, m in sides.items()})


@pytest.mark.parametrize("name", ["four", "two"])
def test_protocols_ask_for_what_they_read(name: str) -> None:
    protocol = find_protocol(name)
    asked = protocol.question("- character: cat")
    assert "- character: cat" in asked
    assert "{" not in asked.split("\n- character")[0]
    for dimension in protocol.dimensions:
        assert f"\n{dimension}" in asked
    form = asked[asked.rindex('{"first"') :]
    assert set(protocol.read(form)["first"]) == set(protocol.dimensions)
    repair = protocol.repair("why")
    assert protocol.read(repair[repair.index('{"first"') :])


def test_own_protocols(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("# dimensions: charm\nHow charming?\n{concepts}\n")
    assert find_protocol(path) == Protocol("mine", ("charm",), "How charming?\n{concepts}")
    path.write_text("How charming? {concepts}")
    with pytest.raises(CmloraError, match="first line is not like"):
        find_protocol(path)
    path.write_text("# dimensions: charm\nHow charming?")
    with pytest.raises(CmloraError, match="exactly once"):
        find_protocol(path)
    with pytest.raises(CmloraError, match="give four, two, or a text file"):
        find_protocol("three")


def without(side: str, key: str) -> str:
    table = json.loads(good())
    del table[side][key]
    return json.dumps(table)


REFUSED = [
    "I'm sorry, I cannot compare these pictures.",
    "",
    f"Sure! {good()}",
    good() + " That is all.",
    without("second", "aesthetic_quality"),
    good().replace('"first"', '"Image 1"'),
    good(11),
    good(-1),
    good().replace("5", '"5"', 1),
    good().replace("5", "true", 1),
    good().replace("5", "NaN", 1),
    good()[:-1] + ', "third": {}}',
    good()[:-1] + ', "first": {}}',
    "[1, 2]",
    "[" * 100_000,
]


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_other_answers_are_not_guessed_at(text: str) -> None:
    with pytest.raises(Unreadable):
        FOUR.read(text)


@given(st.lists(st.floats(0, 10), min_size=8, max_size=8), st.booleans())
def test_answers_are_read_back(marks: list[float], fence: bool) -> None:
    table = {
        "first": dict(zip(FOUR.dimensions, marks[:4], strict=True)),
        "second": dict(zip(FOUR.dimensions, marks[4:], strict=True)),
    }
    text = json.dumps(table, indent=2)
    assert FOUR.read(f"```json\n{text}\n```" if fence else text) == table


def test_every_pair_is_asked_in_both_orders_once(study: Study) -> None:
    records = list(study.records().values())
    wanted = pairs(records)
    assert len(wanted) == 4 * math.comb(4, 2)
    backend = Script(good())
    assert judge(study, backend, FOUR, wanted) == 48
    assert judge(study, backend, FOUR, [p.turned for p in wanted]) == 0
    shown = {(row["first"], row["second"]) for row in answers(study)}
    assert len(shown) == 48
    assert shown == {(b, a) for a, b in shown}
    for turns in backend.asked:
        assert len(turns) == 1
        assert len(turns[0].images) == 2
    other = replace(FOUR, text=f"{FOUR.text} Be kind.")
    assert judge(study, backend, other, wanted) == 48


def test_pairs_can_be_chosen(study: Study) -> None:
    records = list(study.records().values())
    assert len(pairs(records, against="merge")) == 4 * 3
    assert len(pairs(records, labels=["naive", "merge"])) == 4
    few = pairs(records, most=2)
    assert len(few) == 2 * 6
    assert {(p.first.key, p.second.key) for p in few} < {
        (p.first.key, p.second.key) for p in pairs(records)
    }
    with pytest.raises(CmloraError, match="no pictures of 'switch'"):
        pairs(records, against="switch")


def test_one_repair_and_no_more(study: Study) -> None:
    pair = pairs(list(study.records().values()))[:1]
    backend = Script("Both are nice.", good(), "Both are nice.", "No.", good())
    assert judge(study, backend, FOUR, pair) == 2
    first, second = answers(study)
    assert first["repaired"]
    assert first["marks"]["second"]["semantic_accuracy"] == 6
    assert first["raw"] == ["Both are nice.", good()]
    assert second["marks"] is None
    assert second["raw"] == ["Both are nice.", "No."]
    assert "not a JSON object" in second["error"]
    said = [turn.text for turn in backend.asked[1]]
    assert said[1] == "Both are nice."
    assert "not a JSON object" in said[2]
    found = judged(study)[0]
    assert (found.asked, found.unreadable, found.repaired, found.half) == (2, 1, 1, 1)
    assert not found.duels


def test_examples_never_show_the_pair_in_question(study: Study) -> None:
    wanted = pairs(list(study.records().values()))[:2]
    marks = FOUR.read(good(2, 9))

    def example(pair: Any, words: str) -> Example:
        pictures = [
            Image.open(study.folder / r.image).convert("RGB") for r in (pair.first, pair.second)
        ]
        return Example(pictures[0], pictures[1], words, marks)

    grey = Image.new("RGB", (32, 32), "grey")
    free = Example(grey, grey, "something else", marks)
    backend = Script(good())
    judge(study, backend, FOUR, wanted[:1], examples=[example(wanted[0], "leak"), free])
    judge(study, backend, FOUR, wanted[:1], examples=[example(wanted[0], "leak")], shots=3)
    for turns in backend.asked[:2]:
        assert [turn.role for turn in turns] == ["user", "assistant", "user"]
        assert "something else" in turns[0].text
        assert json.loads(turns[1].text) == marks
    for turns in backend.asked[2:]:
        assert [turn.role for turn in turns] == ["user"]
    assert len(judged(study)) == 2  # other examples, other verdicts


def test_examples_from_a_file(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "b.png")
    row = {"first": "a.png", "second": "b.png", "concepts": "a cat", "marks": json.loads(good())}
    path = tmp_path / "examples.json"
    path.write_text(json.dumps([row]))
    assert read_examples(path, FOUR)[0].marks["first"]["element_integration"] == 5
    path.write_text(json.dumps([row, {**row, "marks": {}}]))
    with pytest.raises(CmloraError, match="marks of example 1"):
        read_examples(path, FOUR)
    path.write_text(json.dumps([{**row, "first": "no.png"}]))
    with pytest.raises(CmloraError, match=r"no\.png"):
        read_examples(path, FOUR)


def http(chat: Chat, **changes: Any) -> HttpJudge:
    return HttpJudge(chat.url, "eye", **{"limits": QUICK, **changes})


def ask(backend: HttpJudge) -> Answer:
    grey, white = (Image.new("RGB", (8, 8), colour) for colour in ("grey", "white"))
    return backend.ask([Turn("user", "which?", (grey, white))])


def test_a_server_is_asked_in_its_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(Chat(fair)) as chat:
        backend = http(chat, key="secret", prices=(2.0, 5.0))
        answer = ask(backend)
    marks = FOUR.read(answer.text)
    assert marks["second"]["element_integration"] == 10
    request = chat.requests[0]
    assert (request["model"], request["temperature"]) == ("eye", 0)
    assert chat.headers[0]["Authorization"] == "Bearer secret"
    assert backend.spent.cost == pytest.approx(1000 * 2e-6 + 100 * 5e-6)
    assert (answer.tokens_in, answer.tokens_out) == (1000, 100)
    assert "secret" not in repr(backend)


TROUBLES = [
    (429, {"Retry-After": "0.02"}),
    (503, {}),
    b"not json",
    b'{"choices": []}',
]


@pytest.mark.parametrize("trouble", TROUBLES, ids=["429", "503", "text", "empty"])
def test_passing_trouble_is_waited_out(trouble: Any) -> None:
    waited: list[float] = []
    with served(Chat(fair, [trouble, trouble])) as chat:
        backend = http(chat, sleep=waited.append)
        FOUR.read(ask(backend).text)
    assert (backend.spent.requests, backend.spent.retries) == (3, 2)
    asked_for = isinstance(trouble, tuple) and trouble[1]
    assert waited == ([0.02, 0.02] if asked_for else [0.01, 0.02])


def test_silence_is_a_time_out() -> None:
    with served(Chat(fair, [1.0])) as chat:
        backend = http(chat, limits=replace(QUICK, timeout=0.2))
        FOUR.read(ask(backend).text)
    assert backend.spent.retries == 1


def test_lasting_trouble_is_said() -> None:
    with served(Chat(fair, [(500, {})] * 9)) as chat:
        with pytest.raises(CmloraError, match=r"no answer in 4 attempts \(HTTP 500\)"):
            ask(http(chat))
        chat.trouble = [(401, {})]
        with pytest.raises(CmloraError, match="HTTP 401; is the key right"):
            ask(http(chat, key="wrong"))
        chat.trouble = [(307, {"Location": "http://127.0.0.1:9/elsewhere"})]
        with pytest.raises(CmloraError, match="HTTP 307"):
            ask(http(chat, key="secret"))
    with pytest.raises(CmloraError, match="no answer in 2 attempts"):
        ask(HttpJudge("http://127.0.0.1:9/v1", "eye", limits=Limits(attempts=2, backoff=0.001)))
    with pytest.raises(CmloraError, match="expected http"):
        HttpJudge("ftp://host/v1", "eye")


def test_rate_and_budget_are_kept() -> None:
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with served(Chat(fair)) as chat:
        limits = replace(QUICK, per_minute=30)
        backend = http(chat, limits=limits, clock=lambda: now[0], sleep=sleep)
        for _ in range(4):
            ask(backend)
        assert now[0] == pytest.approx(106)
        poor = http(chat, limits=replace(QUICK, budget=0.004), prices=(2.0, 0.0))
        ask(poor)
        ask(poor)
        with pytest.raises(CmloraError, match=r"the budget of 0\.004 is used up"):
            ask(poor)


def test_a_whole_judgement_over_http(study: Study) -> None:
    """Every kind of trouble on the way; what comes out is the order by brightness."""
    wanted = pairs(list(study.records().values()))
    refusal = "I'm sorry, I can't help with that."
    trouble = [(429, {"Retry-After": "0"}), refusal, "{", (502, {}), refusal, refusal]
    with served(Chat(fair, trouble)) as chat:
        assert judge(study, http(chat), FOUR, wanted) == 48
    found = judged(study)[0]
    assert (found.unreadable, found.half, len(found.duels)) == (2, 0, 23)
    assert not found.bias().found
    assert found.bias().agreement == 1
    bright = {}
    for record in study.records().values():
        with Image.open(study.folder / record.image) as picture:
            bright["+".join(record.ids), record.label] = brightness(picture.convert("RGB"))
    for duel in found.duels:
        expected = bright[duel.unit, duel.one], bright[duel.unit, duel.other]
        assert duel.marks(OVERALL) == pytest.approx(expected, abs=1e-3)


def test_questions_that_were_asked_are_not_asked_again(study: Study) -> None:
    """After the judge has failed in the middle."""
    wanted = pairs(list(study.records().values()))
    with served(Chat(fair)) as chat:
        poor = http(chat, prices=(1000.0, 0.0), limits=replace(QUICK, budget=10))
        with pytest.raises(CmloraError, match="budget"):
            judge(study, poor, FOUR, wanted)
        assert len(answers(study)) == 10
        assert judge(study, http(chat), FOUR, wanted) == 38
        assert len(chat.requests) == 48


def test_a_biased_judge_is_found_out(study: Study) -> None:
    wanted = pairs(list(study.records().values()))
    with served(Chat(partial)) as chat:
        judge(study, http(chat), FOUR, wanted)
    with served(Chat(fair)) as chat:
        judge(study, HttpJudge(chat.url, "fair", limits=QUICK), FOUR, wanted)
    biased, honest = judged(study)
    # four sets are all there are here: the smallest p of a sign-flip test is 2 / 2^4
    assert biased.bias().pull.value == pytest.approx(0.8, abs=0.01)
    assert biased.bias().p == 0.125
    assert honest.bias().pull.value == pytest.approx(0, abs=1e-9)
    for label in honest.labels:  # means of both orders: the gift cancels
        assert biased.win_rate(label, OVERALL) == honest.win_rate(label, OVERALL)


def test_a_planted_bias_is_detected_over_http(tmp_path: Path) -> None:
    """Sets enough for a verdict: a gift to the first picture is found, a fair judge is cleared."""
    run = make_study(tmp_path / "run", words=("naive", "merge"), sizes=(2,), sets=12, seeds=(0,))
    wanted = pairs(list(run.records().values()))
    for opinion, name in ((partial, "partial"), (fair, "fair")):
        with served(Chat(opinion)) as chat:
            assert judge(run, HttpJudge(chat.url, name, limits=QUICK), FOUR, wanted) == 24
    found = {verdicts.judge: verdicts.bias() for verdicts in judged(run)}
    biased, honest = (next(b for k, b in found.items() if n in k) for n in ("partial", "fair"))
    assert biased.found
    assert biased.p == pytest.approx(2 / 2**12)
    assert biased.pull.value == pytest.approx(0.8, abs=0.01)
    assert not honest.found
    assert honest.p == 1


def test_a_local_model_end_to_end(study: Study, tmp_path: Path) -> None:
    """A tiny random LLaVA cannot answer in the form, so every answer is kept and none counts."""
    folder = models.save_vlm(tmp_path / "llava")
    backend = LocalJudge(str(folder), max_tokens=4)
    wanted = pairs(list(study.records().values()), against="merge", most=1)[:2]
    assert judge(study, backend, FOUR, wanted) == 4
    rows = answers(study)
    assert all(row["marks"] is None and len(row["raw"]) == 2 for row in rows)
    assert all(row["tokens"][0] > 2000 and 2 <= row["tokens"][1] <= 8 for row in rows)
    assert judged(study)[0].unreadable == 4
    again = LocalJudge(str(folder), max_tokens=4)
    pictures = tuple(Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    turn = Turn("user", "which?", pictures)
    assert backend.ask([turn]) == again.ask([turn])
    turned = Turn("user", "which?", pictures[::-1])
    assert backend.ask([turn]).tokens_in == backend.ask([turned]).tokens_in
    with pytest.raises(CmloraError, match="hf download /no/such"):
        LocalJudge("/no/such")
