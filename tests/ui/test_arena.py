"""Votes become standings: known orders are found again, and doubt has its width."""

import json
import math
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmlora.errors import CmloraError
from cmlora.eval.correlate import read_scores
from cmlora.ui.arena import Duel, Entry, Vote, duels, elo, scores, standings, strengths
from cmlora.ui.tab_judge import standings_html


def _entry(name: str, unit: str = "seed 0", **metrics: float) -> Entry:
    return Entry(f"{name} {unit}.png", name, unit, metrics)


def _votes(strength: dict[str, float], count: int, seed: int = 0) -> list[Vote]:
    """Votes of somebody who follows Bradley and Terry's model."""
    random, names, found = Random(seed), sorted(strength), []
    for index in range(count):
        a, b = random.sample(names, 2)
        wins = random.random() < strength[a] / (strength[a] + strength[b])
        duel = Duel(_entry(a, f"seed {index}"), _entry(b, f"seed {index}"))
        found.append(Vote(duel, "left" if wins else "right"))
    return found


def test_every_pair_of_a_column_meets_once_and_no_other() -> None:
    found = [_entry(n, u) for n in "abc" for u in ("seed 0", "seed 1")]
    pairs = duels(found, seed=3)
    seen = {frozenset((d.left.id, d.right.id)) for d in pairs}
    assert len(pairs) == len(seen) == 6
    assert all(d.left.unit == d.right.unit for d in pairs)
    assert duels(found, seed=3) == pairs
    assert duels(found, seed=4) != pairs


def test_sides_do_not_give_the_method_away() -> None:
    found = [_entry(n, f"seed {i}") for n in "ab" for i in range(60)]
    lefts = sum(duel.left.contender == "a" for duel in duels(found, seed=0))
    assert 15 < lefts < 45


def test_a_known_order_is_found_again() -> None:
    truth = {"weak": 1.0, "middling": 3.0, "strong": 9.0}
    found = standings(_votes(truth, 600))
    assert [s.name for s in found] == ["strong", "middling", "weak"]
    expected = {n: 400 * math.log10(v / 3.0) + 1000 for n, v in truth.items()}
    for standing in found:
        assert standing.low < expected[standing.name] < standing.high
        assert standing.low <= standing.rating <= standing.high


def test_few_votes_have_wide_intervals() -> None:
    truth = {"a": 1.0, "b": 2.0}
    few, many = standings(_votes(truth, 20)), standings(_votes(truth, 500))
    assert few[0].high - few[0].low > 2 * (many[0].high - many[0].low)


def test_strengths_are_where_the_likelihood_is_largest() -> None:
    wins = np.array([[0, 7, 3.5], [2, 0, 5], [1.5, 4, 0]])

    def likelihood(ratings: np.ndarray) -> float:
        log = (ratings - 1000) * math.log(10) / 400
        return math.fsum(
            (wins[i, j] + 0.1 * (i != j)) * -math.log1p(math.exp(log[j] - log[i]))
            for i in range(3)
            for j in range(3)
        )

    found = strengths(wins[None])[0]
    assert found.mean() == pytest.approx(1000)
    for step in (*np.eye(3), *-np.eye(3)):
        assert likelihood(found) > likelihood(found + step)


@given(
    st.lists(
        st.tuples(
            st.permutations("abc").map(lambda names: names[:2]),
            st.sampled_from(["left", "right", "tie"]),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_elo_is_conserved_and_mirrored(rows: list[tuple[list[str], str]]) -> None:
    votes = [Vote(Duel(_entry(a), _entry(b)), c) for (a, b), c in rows]  # type: ignore[arg-type]
    other = {"left": "right", "right": "left", "tie": "tie"}
    mirrored = [
        Vote(Duel(v.duel.right, v.duel.left), other[v.choice])  # type: ignore[arg-type]
        for v in votes
    ]
    rated = elo(votes)
    assert sum(rated.values()) == pytest.approx(1000 * len(rated))
    assert elo(mirrored) == pytest.approx(rated)


def test_one_win_is_worth_half_the_step() -> None:
    assert elo([Vote(Duel(_entry("a"), _entry("b")), "left")]) == {"a": 1016.0, "b": 984.0}


def test_exported_votes_are_scores_that_correlate_reads(tmp_path: Path) -> None:

    a, b, c = _entry("a", clip_score=30.0), _entry("b", clip_score=20.0), _entry("c")
    votes = [Vote(Duel(a, b), "left"), Vote(Duel(c, a), "tie"), Vote(Duel(b, c), "right")]
    path = tmp_path / "votes.json"
    path.write_text(json.dumps(scores(votes, "anna")))
    found = {item.method: item for item in read_scores(path)}
    assert found["a"].human == {"preference": {"anna": 0.75}}
    assert found["b"].human == {"preference": {"anna": 0.0}}
    assert found["a"].metrics == {"clip_score": 30.0}
    assert found["c"].unit == "seed 0"


def test_no_votes_are_said_to_be_none() -> None:
    with pytest.raises(CmloraError, match="no votes"):
        scores([], "anna")
    assert standings([]) == []
    assert "no votes yet" in standings_html([])


def test_standings_name_every_method() -> None:
    page = standings_html(_votes({"merge": 1.0, "<b>": 2.0}, 10))
    assert "merge" in page
    assert "&lt;b&gt;" in page
    assert "<svg" in page
