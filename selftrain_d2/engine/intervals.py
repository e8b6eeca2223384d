"""Means with confidence intervals, and paired comparisons, of a few runs: Student's t distribution.

No rank test beside it: of three pairs, Wilcoxon's exact two-sided p is 0.25 at best.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """``mean`` +- ``half_width``; that is None for a single value, which has no interval."""

    mean: float
    half_width: float | None
    number: int


@dataclass(frozen=True)
class PairedTest:
    """The mean difference of pairs, its interval, and the p value of the two-sided paired t test.

    ``p`` is None where the test says nothing: one pair, or differences that are all the same.
    """

    difference: Interval
    p: float | None


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean of independent, roughly normal values, and its confidence interval.

    Args:
        values: at least one.
        confidence: probability, in (0, 1).
    """
    mean, number = statistics.fmean(values), len(values)
    if number < 2:
        return Interval(mean, None, number)
    error = statistics.stdev(values) / math.sqrt(number)
    return Interval(mean, float(stats.t.ppf((1 + confidence) / 2, number - 1)) * error, number)


def paired_test(values: Sequence[float], baseline: Sequence[float]) -> PairedTest:
    """Compare values with a baseline; equal places share what else varies (the seed).

    Args:
        values, baseline: of the same length, at least one.
    """
    differences = [value - base for value, base in zip(values, baseline)]
    interval = mean_interval(differences)
    deviation = statistics.stdev(differences) if len(differences) > 1 else 0.0
    # Differences that are the same up to rounding leave no error to measure the mean by.
    if deviation <= 1e-12 * max(map(abs, differences)):
        return PairedTest(interval, None)
    t = interval.mean / (deviation / math.sqrt(len(differences)))
    return PairedTest(interval, float(2 * stats.t.sf(abs(t), len(differences) - 1)))
