"""Intervals and tests against Student's own density, and against printed tables."""

import math

import numpy as np
import pytest

from selftrain_d2.engine.intervals import Interval, mean_interval, paired_test


def density(t, degrees):
    """Of Student's t distribution, by its definition."""
    log_constant = (
        math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    )
    return np.exp(log_constant - (degrees + 1) / 2 * np.log1p(t**2 / degrees))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 8, 29])
@pytest.mark.parametrize("t", [0.1, 1.0, 2.5, 6.0])
def test_p_is_the_integral_of_the_density(degrees, t):
    nodes, weights = np.polynomial.legendre.leggauss(200)
    inside = t / 2 * (weights * density(t / 2 * (nodes + 1), degrees)).sum() * 2  # both sides of 0
    # Pairs with that t: differences of mean 1 and any spread, scaled to the error 1 / t.
    spread = np.linspace(-1.0, 1.0, degrees + 1)
    error = spread.std(ddof=1) / math.sqrt(degrees + 1)
    differences = 1.0 + spread / (error * t)
    assert paired_test(list(differences), [0.0] * (degrees + 1)).p == pytest.approx(1 - inside, abs=1e-12)


# From printed tables of the two-sided 95 % and 99 % points.
@pytest.mark.parametrize(
    ("degrees", "at_95", "at_99"),
    [(1, 12.706, 63.657), (2, 4.303, 9.925), (4, 2.776, 4.604), (9, 2.262, 3.250), (30, 2.042, 2.750)],
)
def test_intervals_of_printed_tables(degrees, at_95, at_99):
    values = list(np.linspace(-1.0, 1.0, degrees + 1))
    error = np.std(values, ddof=1) / math.sqrt(degrees + 1)
    for confidence, quantile in ((0.95, at_95), (0.99, at_99)):
        assert mean_interval(values, confidence).half_width / error == pytest.approx(quantile, abs=5e-4)


def test_interval_by_hand():
    # Mean 12, deviation 2, error 2 / sqrt(3), times 4.302653 for 2 degrees of freedom.
    interval = mean_interval([10.0, 12.0, 14.0])
    assert interval.mean == 12 and interval.number == 3
    assert interval.half_width == pytest.approx(4.302652730 * 2 / math.sqrt(3))
    assert mean_interval([10.0]) == Interval(10.0, None, 1)


def test_interval_covers_the_mean_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(5.0, 3.0, (4000, 3))
    intervals = [mean_interval(list(sample)) for sample in samples]
    covered = np.mean([abs(interval.mean - 5.0) <= interval.half_width for interval in intervals])
    assert 0.94 < covered < 0.96  # three standard errors


def test_paired_test_by_hand():
    # Differences 1, 2, 3: t = 2 / (1 / sqrt(3)) = 3.4641; for 2 degrees P(|T| <= t) = t / sqrt(2 + t^2).
    test = paired_test([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    t = 2 * math.sqrt(3)
    assert test.difference.mean == 2
    assert test.p == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert test.p == pytest.approx(0.0742, abs=5e-5)
    assert paired_test([10.0, 20.0, 30.0], [11.0, 22.0, 33.0]).p == pytest.approx(test.p)


def test_pairs_that_say_nothing_have_no_p():
    assert paired_test([1.0], [0.5]).p is None
    assert paired_test([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]).p is None
    same = paired_test([0.1 + 0.2, 0.3], [0.1, 0.1])  # differ by rounding alone
    assert same.p is None and same.difference.mean == pytest.approx(0.2)
