"""Intervals, paired tests, agreement and rankings, from plain numbers; no model, no files.

What is drawn at random is drawn from a fixed seed, so equal numbers give equal results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Correlation = Literal["pearson", "spearman", "kendall"]
RESAMPLES = 4000
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """An estimate between two bounds.

    Args:
        value: the estimate from the data themselves; NaN if there are none.
        low: lower bound.
        high: upper bound.
        count: how many independent units it rests on.
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def unit_means(values: Mapping[str, Sequence[float]]) -> Array:
    """One mean per unit: pictures of one set are not independent, sets are.

    Args:
        values: of every unit, by its name; empty units are left out.
    """
    return np.array([math.fsum(v) / len(v) for _, v in sorted(values.items()) if len(v)])


def mean_interval(
    values: Sequence[float] | Array, *, level: float = 0.95, resamples: int = RESAMPLES
) -> Interval:
    """Mean with a bias-corrected and accelerated bootstrap interval.

    Efron, "Better Bootstrap Confidence Intervals" (1987); the acceleration is the jackknife's, for
    the mean a third of the skewness's standard error.

    Args:
        values: one per independent unit.
        level: coverage.
        resamples: how often units are drawn with replacement.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(x.mean())
    spread = x - mean
    if len(x) == 1 or float(np.abs(spread).max()) <= 1e-12 * max(1.0, abs(mean)):
        alone = math.nan if len(x) == 1 else mean
        return Interval(mean, alone, alone, len(x))
    # n means of n draws with replacement: multinomial counts are the same and need less memory
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=resamples)
    drawn = np.sort(counts @ x / len(x))
    below = (drawn < mean).mean() + 0.5 * (drawn == mean).mean()
    bias = _NORMAL.inv_cdf(min(max(float(below), 0.5 / resamples), 1 - 0.5 / resamples))
    skew = float((spread**3).sum() / (6 * (spread**2).sum() ** 1.5))
    bounds = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = bias + _NORMAL.inv_cdf(tail)
        bounds.append(_NORMAL.cdf(bias + z / (1 - skew * z)))
    low, high = np.quantile(drawn, bounds)
    return Interval(mean, float(low), float(high), len(x))


def stratified_interval(
    strata: Sequence[Sequence[float]], *, level: float = 0.95, resamples: int = RESAMPLES
) -> Interval:
    """The mean of the strata's means, with a percentile bootstrap interval.

    Units are drawn within their strata, so every stratum counts the same however large it is.

    Args:
        strata: values of the units of each; empty ones are left out.
        level: coverage.
        resamples: how often.
    """
    groups = [np.asarray(s, dtype=np.float64) for s in strata if len(s)]
    count = sum(map(len, groups))
    if not groups:
        return Interval(math.nan, math.nan, math.nan, 0)
    value = float(np.mean([g.mean() for g in groups]))
    if min(map(len, groups)) < 2:
        return Interval(value, math.nan, math.nan, count)
    rng = np.random.default_rng(0)
    drawn = np.zeros(resamples)
    for g in groups:
        counts = rng.multinomial(len(g), np.full(len(g), 1 / len(g)), size=resamples)
        drawn += counts @ g / len(g) / len(groups)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), count)


def sign_flip(differences: Sequence[float] | Array, *, flips: int = 20_000) -> float:
    """p of the mean difference when every sign is as likely the other one, two-sided.

    All sign patterns are tried if there are no more than `flips` of them; otherwise so many random
    ones, with the observed pattern counted among them.

    Args:
        differences: one per independent unit.
        flips: random patterns.
    """
    d = np.asarray(differences, dtype=np.float64)
    n = len(d)
    observed = abs(float(d.sum()))
    if n == 0 or observed == 0:
        return 1.0
    slack = 1e-9 * float(np.abs(d).sum())
    if 2**n <= flips:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        sums = (1 - 2 * bits) @ d
        return float((np.abs(sums) >= observed - slack).mean())
    signs = 1 - 2 * np.random.default_rng(0).integers(0, 2, (flips, n), dtype=np.int8)
    sums = signs.astype(np.float64) @ d
    return float((1 + (np.abs(sums) >= observed - slack).sum()) / (1 + flips))


def wilcoxon(differences: Sequence[float] | Array) -> float:
    """p of Wilcoxon's signed-rank test, two-sided; zeros left out, normal with ties corrected."""
    d = np.asarray(differences, dtype=np.float64)
    largest = float(np.abs(d).max(initial=0))
    if largest == 0:
        return 1.0
    d = np.round(d / largest, 12)  # equal differences stay equal whatever they were computed from
    d = d[d != 0]
    n = len(d)
    ranks = _ranks(np.abs(d))
    positive = float(ranks[d > 0].sum())
    variance = float((ranks**2).sum()) / 4
    z = (positive - n * (n + 1) / 4) / math.sqrt(variance)
    return 2 * _NORMAL.cdf(-abs(z))


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for how many there are, by Holm's step-down rule.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    ordered = sorted(ps, key=lambda name: ps[name])
    found: dict[str, float] = {}
    worst = 0.0
    for place, name in enumerate(ordered):
        worst = max(worst, min(1.0, (len(ps) - place) * ps[name]))
        found[name] = worst
    return {name: found[name] for name in ps}


def correlation(x: Sequence[float], y: Sequence[float], kind: Correlation) -> float:
    """Pearson's r, Spearman's rho or Kendall's tau-b; NaN if one side is constant."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}")
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    if kind == "kendall":
        left, right = np.sign(a[:, None] - a), np.sign(b[:, None] - b)
        return float((left * right).sum() / math.sqrt((left**2).sum() * (right**2).sum()))
    if kind == "spearman":
        a, b = _ranks(a), _ranks(b)
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / math.sqrt((a @ a) * (b @ b)))


def correlation_interval(
    x: Sequence[float],
    y: Sequence[float],
    kind: Correlation,
    *,
    groups: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """A correlation with its percentile bootstrap interval.

    Args:
        x: one value per item.
        y: one value per item.
        kind: which coefficient.
        groups: items of one group are drawn together, as pictures of one set are not independent.
        level: coverage.
        resamples: how often.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    labels = list(range(len(a))) if groups is None else list(groups)
    members: dict[object, list[int]] = {}
    for place, label in enumerate(labels):
        members.setdefault(label, []).append(place)
    blocks = [np.array(places) for places in members.values()]
    value = correlation(a.tolist(), b.tolist(), kind)
    if len(blocks) < 3 or math.isnan(value):
        return Interval(value, math.nan, math.nan, len(blocks))
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(resamples):
        chosen = np.concatenate([blocks[i] for i in rng.integers(0, len(blocks), len(blocks))])
        drawn.append(correlation(a[chosen].tolist(), b[chosen].tolist(), kind))
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), len(blocks))


def krippendorff(ratings: Sequence[Sequence[float | None]]) -> float:
    """Krippendorff's alpha for numbers on an interval scale; 1 agreement, 0 chance.

    Args:
        ratings: per item one rating per rater, ``None`` where one is missing.

    Returns:
        NaN if no item has two ratings or all ratings are equal.
    """
    rated = [[float(v) for v in item if v is not None] for item in ratings]
    rated = [item for item in rated if len(item) > 1]
    values = np.array([v for item in rated for v in item])
    if len(values) == 0 or np.ptp(values) == 0:
        return math.nan
    # the sum of squared differences of all ordered pairs is 2 n times the sum of squares
    within = sum(
        2 * len(item) * float(np.var(item)) * len(item) / (len(item) - 1) for item in rated
    )
    n = len(values)
    observed = within / n
    expected = 2 * n * float(values.var()) * n / (n * (n - 1))
    return float(1 - observed / expected)


def bradley_terry(wins: Array, *, prior: float = 0.0, tolerance: float = 1e-10) -> Array:
    """Strengths by which i beats j with probability s_i / (s_i + s_j), by maximum likelihood.

    Newman's iteration, "Efficient computation of rankings from pairwise comparisons" (2023), which
    has the fixed points of Zermelo's and needs far fewer rounds. A tie is half a win for both.

    Args:
        wins: (..., N, N), how often row beat column; every table is fitted by itself.
        prior: so many wins and losses are added between every two that were compared. Without,
            strengths do not exist where one side never loses.
        tolerance: of the iteration, relative.

    Returns:
        (..., N) logarithms of the strengths, with mean 0; infinite ones are cut off at +-30.
    """
    w = np.array(wins, dtype=np.float64)
    w += prior * ((w + np.swapaxes(w, -1, -2)) > 0)
    n = w.shape[-1]
    w[..., np.arange(n), np.arange(n)] = 0
    strength = np.ones(w.shape[:-1])
    for _ in range(20_000):
        before = strength.copy()
        for i in range(n):
            total = strength[..., i : i + 1] + strength  # (..., N)
            gained = (w[..., i, :] * strength / total).sum(-1)
            lost = (w[..., :, i] / total).sum(-1)
            fitted = np.clip(gained / np.maximum(lost, 1e-300), 1e-13, 1e13)
            strength[..., i] = np.where(gained + lost > 0, fitted, strength[..., i])
        strength /= np.exp(np.log(strength).mean(-1, keepdims=True))
        if float(np.abs(strength / before - 1).max()) < tolerance:
            break
    logs: Array = np.clip(np.log(strength), -30, 30)
    centred: Array = logs - logs.mean(-1, keepdims=True)
    return centred


def _ranks(values: Array) -> Array:
    """Ranks from 1 on; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Array = (ends - (counts - 1) / 2)[inverse]
    return ranks
