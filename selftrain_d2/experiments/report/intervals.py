"""Means with confidence intervals, and paired comparisons, of a few runs: Student's t distribution.

No rank test beside it: of three pairs, Wilcoxon's exact two-sided p is 0.25 at best.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

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
    return Interval(mean, t_quantile(confidence, number - 1) * error, number)


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
    return PairedTest(interval, 1 - t_probability(abs(t), len(differences) - 1))


def t_probability(t: float, degrees: int) -> float:
    """P(\\|T\\| <= t) of Student's t distribution, in closed form.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4: a finite sum in the angle
    arctan(t / sqrt(degrees)).

    Args:
        t: not negative; may be infinite.
        degrees: degrees of freedom, a whole number from 1.
    """
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(2 + odd, degrees + 1, 2):  # the terms cos^(power - 2), each from the one before
        total += term
        term *= cosine**2 * (power - 1) / power
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(probability: float, degrees: int) -> float:
    """The t with P(\\|T\\| <= t) = probability, by bisection to full precision.

    Args:
        probability: in (0, 1).
        degrees: as in :func:`t_probability`.
    """
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < probability:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if t_probability(middle, degrees) < probability else (low, middle)
    return high
