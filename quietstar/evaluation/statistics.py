"""Paired statistics over items, by scipy: intervals, tests, and how many items it would take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
RESAMPLES = 9_999
LEVEL = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Mean:
    """A metric over items.

    Attributes:
        value: Mean over items and thought samples.
        stderr: Of the mean, from the spread over items; None for one item.
        stdev_items: Between the items, the part of thought samples taken off.
        stdev_samples: Between thought samples of an item; None for one sample.
    """

    value: float
    stderr: float | None
    stdev_items: float | None
    stdev_samples: float | None


@dataclass(frozen=True)
class Difference:
    """A metric's mean difference between two variants, paired by item.

    Attributes:
        value: Of the means.
        ci95: Bootstrap interval (bias-corrected and accelerated); None for one item.
        p_value: Exact McNemar test of metrics that are 0 or 1, else a paired permutation test.
        test: Which of them.
        items_needed: So many items would tell a difference of this size (two-sided test at 5 %,
            power 80 %); None if there is no difference.
    """

    value: float
    ci95: tuple[float, float] | None
    p_value: float | None
    test: str
    items_needed: int | None


def mean(values: Array) -> Mean:
    """Of a metric.

    Args:
        values: (items, samples).
    """
    items, samples = values.shape
    of_items = values.mean(1)
    stderr = float(of_items.std(ddof=1) / math.sqrt(items)) if items > 1 else None
    if samples == 1:
        spread = None if items == 1 else float(of_items.std(ddof=1))
        return Mean(float(of_items.mean()), stderr, spread, None)
    within = float(values.var(1, ddof=1).mean())
    between = float(of_items.var(ddof=1)) - within / samples if items > 1 else 0.0
    return Mean(float(of_items.mean()), stderr, math.sqrt(max(between, 0.0)), math.sqrt(within))


def difference(after: Array, before: Array, seed: int) -> Difference:
    """After minus before, (items, samples) each; samples are averaged.

    Args:
        after: A metric of every item.
        before: The same metric of the same items.
        seed: Of resampling.
    """
    a, b = after.mean(1), before.mean(1)
    gaps = a - b
    test, p_value = _test(a, b, seed)
    return Difference(float(gaps.mean()), interval(gaps, seed), p_value, test, items_needed(gaps))


def interval(values: Array, seed: int) -> tuple[float, float] | None:
    """Bootstrap interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    if np.ptp(values) < 1e-12:  # all alike: nothing to resample
        return float(values[0]), float(values[0])
    rng = np.random.default_rng(seed)
    for method in ("BCa", "percentile"):  # the first has no answer where the values hardly differ
        with np.errstate(invalid="ignore", divide="ignore"):
            found = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, batch=500,
                                    confidence_level=LEVEL, method=method, rng=rng)  # fmt: skip
        low, high = map(float, found.confidence_interval)
        if math.isfinite(low) and math.isfinite(high):
            return low, high
    return None


def ratio_interval(sums: Array, counts: Array, seed: int) -> tuple[float, float] | None:
    """Bootstrap interval of sum(sums) / sum(counts), resampled by item."""
    if len(sums) < 2:
        return None

    def ratio(s: Array, c: Array, axis: int = -1) -> Any:
        return s.sum(axis) / c.sum(axis)

    found = stats.bootstrap(
        (sums, counts), ratio, paired=True, vectorized=True, n_resamples=1_999, batch=500,
        confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(seed),
    )  # fmt: skip
    low, high = map(float, found.confidence_interval)
    return low, high


def _test(a: Array, b: Array, seed: int) -> tuple[str, float | None]:
    if len(a) < 2:
        return "none", None
    if np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        gained, lost = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
        if gained + lost == 0:
            return "McNemar, exact", 1.0
        return "McNemar, exact", float(stats.binomtest(gained, gained + lost, 0.5).pvalue)
    if np.abs(a - b).max() < 1e-12:
        return "permutation, paired", 1.0

    def statistic(x: Array, y: Array, axis: int = -1) -> Any:
        return (x - y).mean(axis)

    found = stats.permutation_test(
        (a, b), statistic, permutation_type="samples", vectorized=True, n_resamples=RESAMPLES,
        batch=500, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return "permutation, paired", float(found.pvalue)


def items_needed(gaps: Array) -> int | None:
    """Items that would tell a mean difference of this size, by the normal approximation."""
    size = abs(float(gaps.mean()))
    if len(gaps) < 2 or size < 1e-12:
        return None
    z = stats.norm.ppf(1 - (1 - LEVEL) / 2) + stats.norm.ppf(POWER)
    return math.ceil((z * float(gaps.std(ddof=1)) / size) ** 2)
