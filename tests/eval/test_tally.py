"""What becomes of verdicts: wins, rates, ranking, and a bias towards a place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmlora.eval.judge.protocol import find_protocol
from cmlora.eval.judge.tally import OVERALL, Duel, Verdicts

FOUR = find_protocol("four")


@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_bias_is_told_from_noise(seed: int) -> None:
    """Forty sets; noise of one mark; a gift of one mark to the first picture, or none."""
    found = {gift: planted(gift, seed).bias() for gift in (0.0, 1.0)}
    assert found[1.0].found
    assert found[1.0].pull.low < 1 < found[1.0].pull.high or abs(found[1.0].pull.value - 1) < 0.5
    assert found[0.0].agreement > found[1.0].agreement or found[0.0].p > found[1.0].p


def planted(gift: float, seed: int, strengths: tuple[float, ...] = (0.0, 0.5, 1.5)) -> Verdicts:
    """Verdicts of a judge with known habits on methods of known quality."""
    rng = np.random.default_rng(seed)
    found = Verdicts("planted", "one", ("charm", OVERALL))
    for unit in range(40):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            a, b = 4 + strengths[i], 4 + strengths[j]
            noise = rng.normal(size=4)
            forward = {"charm": (a + gift + noise[0], b + noise[1])}
            backward = {"charm": (a + noise[2], b + gift + noise[3])}
            found.duels.append(Duel(f"m{i}", f"m{j}", f"s{unit}", 2, forward, backward))
    return found


def test_no_bias_is_found_too_often() -> None:
    found = sum(planted(0.0, seed).bias().found for seed in range(60))
    assert found <= 8


def test_wins_rates_and_ranking() -> None:
    verdicts = planted(0.3, 1)
    wins = verdicts.wins(OVERALL)
    for (one, other), (won, tied, lost) in wins.items():
        assert won + tied + lost == 40
        assert wins[other, one] == (lost, tied, won)
    rates = [verdicts.win_rate(f"m{i}", OVERALL) for i in range(3)]
    assert rates[0].value < rates[1].value < rates[2].value
    assert sum(rate.value for rate in rates) == pytest.approx(1.5)
    won, tied, _ = wins["m2", "m0"]
    more, even, _ = wins["m2", "m1"]
    assert rates[2].value == pytest.approx((won + more + (tied + even) / 2) / 80)
    strengths = verdicts.strengths(OVERALL)
    assert strengths["m0"].high < strengths["m2"].low
    assert all(s.low <= s.value <= s.high for s in strengths.values())


def test_ties_count_half() -> None:
    verdicts = Verdicts("x", "one", ("charm", OVERALL))
    even = {"charm": (5.0, 5.0)}
    one = {"charm": (6.0, 5.0)}
    verdicts.duels = [
        Duel("a", "b", "s0", 2, even, even),
        Duel("a", "b", "s1", 2, one, one),
        Duel("a", "b", "s2", 2, one, {"charm": (5.0, 6.0)}),  # whichever is shown first wins
    ]
    assert verdicts.wins("charm")["a", "b"] == (1, 2, 0)
    assert verdicts.win_rate("a", "charm").value == pytest.approx(2 / 3)
    assert verdicts.bias("charm").agreement == pytest.approx(2 / 3)
