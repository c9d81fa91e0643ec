"""Every number against scipy or a plain loop; intervals against simulation."""

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from cmlora.eval.statistics import (
    Correlation,
    bradley_terry,
    correlation,
    correlation_interval,
    holm,
    krippendorff,
    mean_interval,
    sign_flip,
    unit_means,
    wilcoxon,
)

SAMPLES = st.lists(st.integers(-6, 6).map(float), min_size=4, max_size=25)


def test_the_interval_is_scipys() -> None:
    x = np.random.default_rng(1).exponential(size=40)
    ours = mean_interval(x, resamples=20_000)
    theirs = stats.bootstrap((x,), np.mean, method="BCa", n_resamples=20_000, rng=2)
    width = ours.high - ours.low
    assert ours.value == pytest.approx(x.mean())
    assert abs(ours.low - theirs.confidence_interval.low) < 0.03 * width
    assert abs(ours.high - theirs.confidence_interval.high) < 0.03 * width


DRAWS: dict[str, Any] = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "share": (lambda rng, n: rng.binomial(4, 0.3, size=n) / 4, 0.3),
    "skewed": (lambda rng, n: rng.gamma(4.0, size=n), 4.0),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_intervals_cover(kind: str) -> None:
    """95 % intervals hold the truth in 93 to 97 % of 800 studies of 60 sets."""
    draw, truth = DRAWS[kind]
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(800):
        found = mean_interval(draw(rng, 60), resamples=500)
        held += found.low <= truth <= found.high
    assert 0.93 <= held / 800 <= 0.97


def test_units_are_sets_and_not_pictures() -> None:
    """Repeating every picture does not narrow the interval."""
    rng = np.random.default_rng(0)
    once = {f"{i}": [float(rng.normal())] for i in range(30)}
    thrice = {name: values * 3 for name, values in once.items()}
    few, many = mean_interval(unit_means(once)), mean_interval(unit_means(thrice))
    assert (many.low, many.high) == pytest.approx((few.low, few.high))
    assert many.count == few.count


def test_intervals_of_too_little() -> None:
    assert mean_interval([]).count == 0
    assert math.isnan(mean_interval([2.0]).low)
    same = mean_interval([0.3, 0.3, 0.3])
    assert (same.low, same.value, same.high) == pytest.approx((0.3, 0.3, 0.3))


@given(SAMPLES)
@settings(max_examples=40)
def test_sign_flips_are_scipys(d: list[float]) -> None:
    ours = sign_flip(d[:12])

    def total(x: Any, axis: int = -1) -> Any:
        return np.sum(x, axis=axis)

    theirs = stats.permutation_test(
        (np.array(d[:12]),), total, permutation_type="samples", n_resamples=np.inf
    )
    # scipy takes twice the smaller tail; for a symmetric distribution that is the same
    assert ours == pytest.approx(min(1.0, theirs.pvalue))


def test_many_sign_flips_are_near_the_t_test() -> None:
    d = np.random.default_rng(3).normal(0.25, 1, size=80)
    assert sign_flip(d) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.01)


@given(SAMPLES)
def test_signed_ranks_are_scipys(d: list[float]) -> None:
    if any(d):
        theirs = stats.wilcoxon(d, zero_method="wilcox", correction=False, method="asymptotic")
        assert wilcoxon(d) == pytest.approx(theirs.pvalue)
    else:
        assert wilcoxon(d) == 1


def test_holm_by_hand_and_by_scipys_bounds() -> None:
    ps = {"a": 0.001, "b": 0.02, "c": 0.02, "d": 0.5}
    found = holm(ps)
    assert found == pytest.approx({"a": 0.004, "b": 0.06, "c": 0.06, "d": 0.5})
    assert all(found[name] <= min(1, 4 * p) for name, p in ps.items())  # never above Bonferroni


@given(st.data())
@settings(max_examples=60)
def test_correlations_are_scipys(data: st.DataObject) -> None:
    x = data.draw(SAMPLES)
    y = data.draw(st.lists(st.integers(-6, 6).map(float), min_size=len(x), max_size=len(x)))
    theirs: dict[Correlation, Any] = {
        "pearson": stats.pearsonr,
        "spearman": stats.spearmanr,
        "kendall": stats.kendalltau,
    }
    for kind, function in theirs.items():
        ours = correlation(x, y, kind)
        if len(set(x)) == 1 or len(set(y)) == 1:
            assert math.isnan(ours)
        else:
            assert ours == pytest.approx(function(x, y).statistic, abs=1e-12)


def test_correlation_intervals_widen_for_groups() -> None:
    rng = np.random.default_rng(0)
    centre = np.repeat(rng.normal(size=12), 8)
    x = centre + 0.3 * rng.normal(size=96)
    y = centre + 0.3 * rng.normal(size=96)
    groups = [f"{i // 8}" for i in range(96)]
    alone = correlation_interval(x.tolist(), y.tolist(), "pearson")
    together = correlation_interval(x.tolist(), y.tolist(), "pearson", groups=groups)
    assert together.value == alone.value == pytest.approx(stats.pearsonr(x, y).statistic)
    assert together.high - together.low > 1.5 * (alone.high - alone.low)
    fisher = stats.pearsonr(x, y).confidence_interval()
    assert alone.low == pytest.approx(fisher.low, abs=0.05)


def by_pairs(ratings: list[list[float | None]]) -> float:
    """Krippendorff's definition, pair by pair."""
    kept = [[v for v in item if v is not None] for item in ratings]
    kept = [item for item in kept if len(item) > 1]
    values = [v for item in kept for v in item]
    observed = sum(
        2 * sum((a - b) ** 2 for a, b in combinations(item, 2)) / (len(item) - 1) for item in kept
    ) / len(values)
    n = len(values)
    expected = 2 * sum((a - b) ** 2 for a, b in combinations(values, 2)) / (n * (n - 1))
    return 1 - observed / expected


@given(
    st.lists(
        st.lists(st.one_of(st.none(), st.integers(0, 10).map(float)), min_size=3, max_size=3),
        min_size=2,
        max_size=8,
    )
)
def test_alpha_is_its_definition(ratings: list[list[float | None]]) -> None:
    found = krippendorff(ratings)
    if not math.isnan(found):
        assert found == pytest.approx(by_pairs(ratings))


def test_alpha_at_its_ends() -> None:
    assert krippendorff([[1, 1], [5, 5], [9, 9]]) == 1
    rng = np.random.default_rng(0)
    assert abs(krippendorff(rng.normal(size=(4000, 3)).tolist())) < 0.03
    assert math.isnan(krippendorff([[1, None], [2, None]]))


def test_strengths_are_the_likeliest() -> None:
    wins = np.array([[0, 7, 9.5, 3], [3, 0, 6, 5], [1.5, 2, 0, 4], [2, 5, 3, 0]])

    def surprise(logs: Any) -> float:
        difference = logs[:, None] - logs[None, :]
        return float((wins * np.logaddexp(0, -difference)).sum())

    best = optimize.minimize(surprise, np.zeros(4), method="BFGS").x
    assert bradley_terry(wins) == pytest.approx(best - best.mean(), abs=1e-4)


def test_a_side_that_always_wins_has_a_place() -> None:
    wins = np.array([[0.0, 4, 4], [0, 0, 3], [0, 1, 0]])
    for prior in (0.0, 0.5):
        found = bradley_terry(wins, prior=prior)
        assert np.isfinite(found).all()
        assert found[0] > found[1] > found[2]
